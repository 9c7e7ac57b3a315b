"""Files of a few hundred bytes that would decode to gigabytes: refused when opened, before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statecodec import codecs, kernels
from statecodec.checkpoint.document import Document
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.codecs import Encoding
from statecodec.codecs.chunking import Chunk, iterate
from statecodec.dtypes import FLOAT32, FLOAT64, of
from statecodec.errors import LimitExceeded, UnsupportedTensor
from statecodec.format import ItemSpec, Limits, Reader, Writer, placement
from tests.format.test_hostile import _peak as peak

SIDE = 1 << 16  # 16 GiB of fp32


def write(path: Path, codec: codecs.Codec, shape: tuple[int, ...]) -> None:
    with Writer(path, [ItemSpec("w", Encoding(codec), shape, FLOAT32)]) as writer:
        parts = {
            name: torch.zeros(spec.shape, dtype=spec.dtype.torch) for name, spec in codec.parts(shape, FLOAT32).items()
        }
        numel = shape[0] * shape[1]
        writer.append(writer.pack(0, Chunk(0, numel, shape), parts))
        writer.close()


@pytest.mark.parametrize(
    "codec",
    [
        "dropped",
        "folded(level=16)",
        "shared(dims=[0,1])",
        "lowrank(rank=1)",
        "shared(dims=[1],inner=lowrank(rank=1))",
        "folded(level=0,inner=shared(dims=[0,1]))",
    ],
)
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
    for chunk in placement.chunks(made, shape, FLOAT64):
        stored = sum(spec.nbytes for spec in made.parts(chunk.shape, FLOAT64).values())
        decoded = (chunk.stop - chunk.start) * 8
        Limits().check_chunk("w", decoded, stored, made.in_pieces)


@pytest.mark.parametrize(
    "text",
    [
        "shared(dims=0)", "shared(dims=1)", "shared(dims=[0,1])", "shared(dims=[1,2])",
        "shared(dims=2,inner=companded)",
        "lowrank(rank=2)", "lowrank(rank=2,rows=last)", "lowrank(rank=2,form=square)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(30,), (5, 6), (4, 3, 5), (1, 40, 2)])
@pytest.mark.parametrize("target", [1, 7, 12, 1000])
def test_pieces_are_those_of_the_whole(text: str, shape: tuple[int, ...], target: int) -> None:
    codec, x = codecs.parse(text), torch.rand(shape, generator=torch.Generator().manual_seed(1))
    try:
        encoded = codec.encode(x)
    except UnsupportedTensor:
        return
    whole, found = encoded.decode().view(-1), torch.full((x.numel(),), torch.nan)
    for piece in iterate(codecs.Raw(), codec.rows_cols(shape), of(x.dtype), target):
        out = torch.empty(piece.shape if len(piece.shape) == 2 else codec.rows_cols(shape))
        codec.decode_piece(encoded.parts, shape, piece.start, out, kernels.host())
        found[piece.start : piece.stop] = out.view(-1)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["shared(dims=1)", "shared(dims=[0,2],inner=companded)", "lowrank(rank=2)"])
def test_a_range_is_decoded_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A tensor beside it is read in many chunks: each takes a few elements of one that is a single chunk."""
    codec, shape = codecs.parse(text), (7, 3, 5)
    encoded = codec.encode(torch.rand(shape, generator=torch.Generator().manual_seed(1)))
    with Writer(tmp_path / "x.safetensors", [ItemSpec("w", Encoding(codec), shape, FLOAT32)]) as writer:
        writer.append(writer.pack(0, Chunk(0, 105, shape), encoded.parts))
        writer.close()
    whole = encoded.decode()
    monkeypatch.setattr(type(codec), "decode_into", lambda *_: pytest.fail("all of it was decoded"))
    document = Document("test", None, (), {"layout": "native"}, (), (), ())
    with StoredCheckpoint(tmp_path, Reader(tmp_path / "x.safetensors"), document) as stored:
        for start, stop in ((0, 1), (0, 30), (3, 15), (14, 16), (17, 29), (31, 104), (45, 105)):
            torch.testing.assert_close(stored.decode_range(0, start, stop), whole.view(-1)[start:stop])


@pytest.mark.parametrize("codec", ["shared(dims=[0,1])", "lowrank(rank=1)"])
def test_a_small_file_of_a_large_tensor_takes_little_memory(tmp_path: Path, codec: str) -> None:
    path, shape = tmp_path / "x.safetensors", (1 << 13, 1 << 15)  # 1 GiB
    write(path, codecs.parse(codec), shape)
    reader = Reader(path)
    stored = StoredCheckpoint(path, reader, Document("test", None, (), {"layout": "native"}, (), (), ()))
    next(iter(stored.stream(stored.items[0])))  # warm
    before = peak(reset=True)
    assert sum(piece.numel() for piece in stored.stream(stored.items[0])) == shape[0] * shape[1]
    assert peak() - before < 128 << 20
    stored.close()
