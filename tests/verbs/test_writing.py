"""A tensor whose values its codec refuses starts again, alone: the others stand as they were written."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec.codecs import Codec, Encoding, chunking, parse
from statecodec.codecs.chunking import Chunk
from statecodec.dtypes import FLOAT32
from statecodec.errors import UnencodableValues
from statecodec.format import ItemSpec, Packing
from statecodec.verbs.appending import EncodedChunk, WriteOptions, appended
from statecodec.verbs.compression import Compression


def bad(path: Path, *, late: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    """Weights of several chunks; a NaN in the first or the last element of the middle one."""
    torch.manual_seed(0)
    value = {f"layer.{i}.weight": torch.randn(64, 512) for i in range(5)}
    value["layer.2.weight"].view(-1)[-1 if late else 0] = torch.nan
    torch.save(value, path)
    return path, value


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("pack", ["zstd", "none"])
@pytest.mark.parametrize("shard", [None, 70_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_refused_tensor_is_stored_exactly(
    late: bool, pack: str, shard: int | None, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking.iterate, "__defaults__", (4096,))
    monkeypatch.setattr(chunking.chunks, "__defaults__", (4096,))
    path, value = bad(tmp_path / "ckpt.pt", late=late)
    encoded: list[int] = []
    encode = Compression.encode

    def counting(self: Compression, index: int, codec: object, chunk: object) -> object:
        encoded.append(index)
        return encode(self, index, codec, chunk)  # type: ignore[arg-type]

    monkeypatch.setattr(Compression, "encode", counting)
    rules = ["weight=companded"]
    report = statecodec.compress(path, rules=rules, pack=pack, max_shard_size=shard, threads=threads, verify=True)
    kept = {t.name: t.codec for t in report.tensors if t.role == "weight"}
    assert kept.pop("layer.2.weight") == "raw"
    assert set(kept.values()) == {"companded"}
    assert [note for note in report.notes if "layer.2.weight" in note and "NaN" in note]
    loaded = statecodec.load(report.path)
    assert torch.equal(loaded["layer.2.weight"].view(torch.int32), value["layer.2.weight"].view(torch.int32))
    if pack == "zstd":  # tensors before the refused one are encoded once
        first = next(i for i, t in enumerate(report.tensors) if t.name == "layer.0.weight")
        assert encoded.count(first) == len(list(chunking.iterate(parse("companded"), (64, 512), FLOAT32)))


def test_what_was_encoded_ahead_in_vain_decides_nothing(tmp_path: Path) -> None:
    """Two tensors are refused at the same time: each of them is once asked for another codec."""
    items = [ItemSpec(name, Encoding(parse("uniform")), (8, 8), FLOAT32) for name in ("first", "second")]
    second, asked = threading.Event(), list[int]()

    def encode(index: int, encoding: Encoding, _: Chunk) -> EncodedChunk:
        if encoding.codec != parse("uniform"):
            return EncodedChunk({"data": torch.zeros(8, 8)})
        if index == 1:
            second.set()
        assert second.wait(60)
        raise UnencodableValues("it holds NaN")

    def fallback(index: int) -> Codec:
        asked.append(index)
        return parse("raw")

    output = WriteOptions(tmp_path / "x.safetensors", Packing("zstd"), threads=2)
    with appended(output, items, encode, "test", fallback=fallback) as (writer, refusals):
        writer.finish({}).publish()
    assert (asked, list(refusals)) == ([0, 1], ["first", "second"])


def test_progress_ends_where_it_should(tmp_path: Path) -> None:
    path, _ = bad(tmp_path / "ckpt.pt", late=True)
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int, _: str) -> None:
        seen.append((done, total))

    statecodec.compress(path, rules=["weight=companded"], progress=progress)
    assert seen[-1][0] == seen[-1][1]
    assert all(0 <= done <= total for done, total in seen)


def test_a_conversion_that_is_refused_leaves_the_tensor_as_it_is(tmp_path: Path) -> None:
    path, value = bad(tmp_path / "ckpt.pt", late=True)
    packed = statecodec.compress(path, preset="lossless")
    report = statecodec.convert(packed.path, tmp_path / "out.sc.safetensors", "weight=companded")
    codecs = {t.name: t.codec for t in report.tensors if t.role == "weight"}
    assert codecs.pop("layer.2.weight") == "raw"
    assert set(codecs.values()) == {"companded"}
    assert any("left as it is" in note and "NaN" in note for note in report.notes)
    loaded = statecodec.load(report.path)["layer.2.weight"]
    assert torch.equal(loaded.view(torch.int32), value["layer.2.weight"].view(torch.int32))
