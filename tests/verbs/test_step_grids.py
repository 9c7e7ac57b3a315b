"""Codecs on grids through whole checkpoints: by rule, restored within their bounds; companions through an open file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

import statecodec
from statecodec import codecs
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.codecs import Encoding
from statecodec.dtypes import FLOAT32
from statecodec.format import ItemSpec, Reader, Writer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A linear layer and a convolution after some steps of AdamW; one unit is dead."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 32, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(512, 64))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(16, 8, 6, 6)).square().mean().backward()
        net[3].weight.grad[7] = 0.0
        optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def test_rules_may_name_grids(checkpoint: Path, tmp_path: Path) -> None:
    rules = ["weight:numel>=1000=uniform(step=1e-5)", "exp_avg_sq:numel>=1000=logarithmic(per_octave=6)"]
    report = statecodec.compress(checkpoint, tmp_path / "x.sc.safetensors", rules=rules, preset="lossless", verify=True)
    assert {t.codec for t in report.tensors} >= {"uniform(step=1e-05)", "logarithmic(per_octave=6)"}
    statecodec.restore(tmp_path / "x.sc.safetensors", tmp_path / "back.pt")
    a, b = (torch.load(p, weights_only=True) for p in (checkpoint, tmp_path / "back.pt"))
    for name, w in a["model"].items():
        assert (b["model"][name].double() - w.double()).abs().max() <= 0.51e-5
    for i, state in a["optimizer"]["state"].items():
        v, again = state["exp_avg_sq"], b["optimizer"]["state"][i]["exp_avg_sq"]
        assert torch.equal(again == 0, v == 0)
        assert torch.allclose(again, v, rtol=2 ** (0.5 / 6) - 0.999, atol=0)


def test_a_rule_s_direction_finds_its_companion_or_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.sc.safetensors"
    report = statecodec.compress(checkpoint, out, rules=["exp_avg=direction(step=0.01)"], preset="live", verify=True)
    assert {t.codec for t in report.tensors if t.role == "exp_avg"} == {"direction"}
    back = statecodec.load(out)["optimizer"]["state"]
    for i, state in torch.load(checkpoint, weights_only=True)["optimizer"]["state"].items():
        error = back[i]["exp_avg"] / (back[i]["exp_avg_sq"].sqrt() + 1e-8)
        error -= state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        assert error.abs().max() < 0.0051
    other = statecodec.compress(checkpoint, tmp_path / "y.sc.safetensors", rules=["weight=direction"])
    assert all(t.codec == "raw" for t in other.tensors if t.role == "weight")
    assert any("no exp_avg_sq is known" in note for note in other.notes)


def test_an_open_file_brings_the_companions(tmp_path: Path) -> None:
    """Cut differently, stored more roughly: decoding takes the same elements of the companion, as it decodes."""
    generator = torch.Generator().manual_seed(1)
    m, v = torch.randn(1100, 1000, generator=generator), torch.rand(1100, 1000, generator=generator)
    direction, rough = codecs.Direction(0.02), codecs.Companded("log", group=300)
    named = {"exp_avg_sq": "v"}
    items = [
        ItemSpec("m", Encoding(direction), (1100, 1000), FLOAT32, {"role": "exp_avg"}, named),
        ItemSpec("v", Encoding(rough), (1100, 1000), FLOAT32, {"role": "exp_avg_sq"}),
    ]
    path = tmp_path / "x.sc.safetensors"
    with Writer(path, items) as writer:
        for i, (x, codec) in enumerate(((m, direction), (v, rough))):
            for c in writer.chunks(i):
                given = {"exp_avg_sq": v.view(-1)[c.start : c.stop]}
                piece = x.view(-1)[c.start : c.stop].view(c.shape)
                writer.append(writer.pack(i, c, codec.encode(piece, companions=given).parts))
        writer.close({})
    rest = rough.encode(v).decode()
    expected = direction.encode(m, companions={"exp_avg_sq": v}).decode(companions={"exp_avg_sq": rest})
    with StoredCheckpoint(path, Reader(path), cast(Any, None)) as stored:  # of tensors alone: there is no document
        assert [len(item.chunks) for item in stored.reader.items] == [2, 2]
        assert torch.equal(stored.decode(0), expected)
        assert torch.equal(stored.decode_range(0, 999_000, 1_049_000), expected.view(-1)[999_000:1_049_000])
        assert torch.equal(stored.encoded(0).decode(), expected)  # stands alone: as values
