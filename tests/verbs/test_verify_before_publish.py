"""An output is finished, then verified, then published: what fails on the way leaves the file that was there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec.errors import StatecodecError, VerificationFailed
from statecodec.verbs import appending, compression, recode


class Unplugged(BaseException):
    """Like KeyboardInterrupt, which pytest takes for itself."""


def earlier(folder: Path) -> tuple[Path, Path, bytes]:
    """A checkpoint, and an older compressed file under the name that it will be compressed to."""
    source, target = folder / "ckpt.pt", folder / "ckpt.sc.safetensors"
    torch.save({"w": torch.zeros(100, 100)}, source)
    statecodec.compress(source, target)
    torch.save({"w": torch.randn(100, 100)}, source)
    return source, target, target.read_bytes()


def _compress(source: Path, target: Path) -> None:
    statecodec.compress(source, target, verify=True, force=True)


def _budget(source: Path, target: Path) -> None:
    statecodec.compress(source, target, max_weight_error=0.01, verify=True, force=True)


def _convert(source: Path, target: Path) -> None:
    statecodec.convert(source, target, "weight=cast", force=True)


def _shards(source: Path, target: Path) -> None:
    statecodec.compress(source, target, verify=True, force=True, max_shard_size=20_000)


@pytest.mark.parametrize("error", [VerificationFailed("no"), Unplugged(), OSError("disk")])
@pytest.mark.parametrize("verb", [_compress, _budget, _convert, _shards])
def test_a_failed_or_interrupted_check_leaves_what_was_there(
    verb: Callable[[Path, Path], None], error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, before = earlier(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(compression, "report_against", fail)
    monkeypatch.setattr(recode, "compare", fail)
    with pytest.raises(type(error)):
        verb(source, target)
    assert target.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", "ckpt.sc.safetensors"]


def test_what_is_written_wrong_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, before = earlier(tmp_path)
    encode = compression.Compression.encode

    def wrong(self: compression.Compression, *args: object) -> appending.EncodedChunk:
        made = encode(self, *args)  # type: ignore[arg-type]
        return appending.EncodedChunk(
            {name: part.clone().zero_() for name, part in made.parts.items()}, made.comparison
        )

    monkeypatch.setattr(compression.Compression, "encode", wrong)
    with pytest.raises(StatecodecError):
        _compress(source, target)
    assert target.read_bytes() == before


def test_a_link_of_a_chain_is_verified_before_it_is_published(tmp_path: Path) -> None:
    source = tmp_path / "a.pt"
    torch.manual_seed(0)
    w = torch.randn(200, 200)
    torch.save({"w": w}, source)
    base = statecodec.compress(source, tmp_path / "a.sc.safetensors", preset="lossless")
    torch.save({"w": w.index_fill(0, torch.tensor([3]), 0.5)}, tmp_path / "b.pt")
    link = statecodec.compress(
        tmp_path / "b.pt", tmp_path / "b.sc.safetensors", base=base.path, preset="lossless", verify=True
    )
    assert any(t.codec.startswith("delta") for t in link.tensors)
    assert link.total is not None
