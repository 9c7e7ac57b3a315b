"""Files of a few hundred bytes that would decode to gigabytes: refused when opened, before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statecodec import codecs
from statecodec.codecs.chunking import Chunk
from statecodec.errors import LimitExceeded
from statecodec.format import Item, Limits, Reader, Writer, placement

SIDE = 1 << 16  # 16 GiB of fp32


def write(path: Path, codec: codecs.Codec, shape: tuple[int, ...]) -> None:
    with Writer(path, [Item("w", codec, shape, torch.float32)]) as writer:
        parts = {
            name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in codec.parts(shape, torch.float32).items()
        }
        numel = shape[0] * shape[1]
        writer.append(writer.pack(0, Chunk(0, numel, shape), parts))
        writer.close()


@pytest.mark.parametrize("codec", ["dropped", "folded(level=16)", "shared(dims=[0,1])", "lowrank(rank=1)"])
def test_one_chunk_decodes_to_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    path, made = tmp_path / "x.safetensors", codecs.parse(codec)
    with monkeypatch.context() as hostile:
        hostile.setattr(placement, "chunks", lambda _, shape, __: [Chunk(0, shape[0] * shape[1], shape)])
        with pytest.raises(LimitExceeded, match="one chunk"):
            write(path, made, (SIDE, SIDE))
        hostile.setattr(Limits, "check_chunk", lambda *_, **__: None)
        write(path, made, (SIDE, SIDE))
    assert path.stat().st_size < 4 << 20
    with pytest.raises(LimitExceeded, match="one chunk"):
        Reader(path)


@pytest.mark.parametrize("codec", ["dropped", "folded(level=16)", "shared(dims=[1])"])
def test_what_the_chunking_gives_is_within_it(tmp_path: Path, codec: str) -> None:
    made, shape = codecs.parse(codec), (3, 1 << 22)
    for chunk in placement.chunks(made, shape, torch.float64):
        stored = sum(spec.nbytes for spec in made.parts(chunk.shape, torch.float64).values())
        decoded = (chunk.stop - chunk.start) * 8
        Limits().check_chunk("w", decoded, stored, made.align(shape) is None)
