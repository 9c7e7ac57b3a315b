"""What is decoded beside another tensor is kept for its own turn, in bounded memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec.checkpoint.decoded_chunks import DecodedChunks
from statecodec.checkpoint.stored import StoredCheckpoint


def test_what_is_held_is_bounded_and_taken_once() -> None:
    held = DecodedChunks(keep=100)
    chunks = [torch.zeros(40, dtype=torch.uint8) for _ in range(3)]
    for i, chunk in enumerate(chunks):
        held.put((0, i), chunk)
    held.put((1, 0), torch.zeros(101, dtype=torch.uint8))
    assert held.take((0, 0)) is None
    assert held.take((1, 0)) is None
    assert held.take((0, 2)) is chunks[2]
    assert held.take((0, 2)) is None
    assert held.take((0, 1)) is chunks[1]


@pytest.mark.parametrize("threads", [1, 3])
def test_restoring_decodes_every_second_moment_once(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(96, 96) for _ in range(4)))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(8, 96)).square().mean().backward()
    optimizer.step()
    path = tmp_path / "ckpt.pt"
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    packed = statecodec.compress(path).path
    alone = statecodec.load(packed)
    decoded: Counter[str] = Counter()
    parts = StoredCheckpoint.parts

    def counting(self: StoredCheckpoint, item: int, *args: object) -> object:
        decoded[self.items[item].name] += 1
        return parts(self, item, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(StoredCheckpoint, "parts", counting)
    statecodec.restore(packed, tmp_path / "back.pt", threads=threads)
    assert set(decoded.values()) == {1}
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    for index, state in back["optimizer"]["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], alone["optimizer"]["state"][index][key])
