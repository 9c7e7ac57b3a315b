"""What is written comes back, under every packing and sharding, and opens with the official safetensors library."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from statecodec.codecs import Encoding, Raw
from statecodec.codecs.chunking import Chunk
from statecodec.dtypes import FLOAT32
from statecodec.errors import FormatError, UsageError
from statecodec.format import ItemSpec, Packing, Reader, Writer
from statecodec.format.container import VERSION
from tests.format.support import bytes_of, sample, write


@pytest.mark.parametrize("packing", ["none", "zstd", "zstd:1", "zstd:19"])
@pytest.mark.parametrize("shard", [None, 20_000])
def test_everything_comes_back(tmp_path: Path, packing: str, shard: int | None) -> None:
    tensors = sample()
    written = write(tmp_path / "x.safetensors", tensors, packing=packing, max_shard_size=shard)
    assert (len(written.files) > 1) == (shard is not None)
    assert written.nbytes == sum(f.stat().st_size for f in written.files)
    for path in {written.path, tmp_path / "x.safetensors"}:
        with Reader(path) as reader:
            assert reader.document == {"note": "test"}
            assert reader.format_version == VERSION
            assert reader.nbytes == written.nbytes
            assert [item.name for item in reader.items] == list(tensors)
            for name, (tensor, codec) in tensors.items():
                encoded = reader.read(name)
                wanted = codec.encode(tensor, backend="reference")
                assert (encoded.codec, encoded.shape, encoded.dtype) == (codec, tuple(tensor.shape), tensor.dtype)
                assert {k: bytes_of(p) for k, p in encoded.parts.items()} == {
                    k: bytes_of(p) for k, p in wanted.parts.items()
                }
                assert reader.items[reader.index(name)].attributes == {"role": "other"}
            assert [c.error for c in reader.verify()] == [None] * len(tensors)


@pytest.mark.parametrize("packing", ["none", "zstd"])
def test_opens_with_the_safetensors_library(tmp_path: Path, packing: str) -> None:
    tensors = sample()
    for file in write(tmp_path / "x.safetensors", tensors, packing=packing, max_shard_size=30_000).files:
        with safe_open(file, "pt") as f:
            assert f.metadata()["format"] == "statecodec"
            for name in f.keys():  # noqa: SIM118
                found = f.get_tensor(name)
                if packing == "none" and name.endswith("/data") and found.dtype == tensors[name[:-5]][0].dtype:
                    assert torch.equal(found, tensors[name[:-5]][0])


def test_every_plain_part_is_aligned(tmp_path: Path) -> None:
    tensors = {
        f"t{i}": (torch.ones(i, dtype=d), Raw()) for i, d in enumerate([torch.int8, torch.float64, torch.int8] * 5)
    }
    write(tmp_path / "x.safetensors", tensors, packing="none")
    with Reader(tmp_path / "x.safetensors") as reader:
        assert {item.storage for item in reader.items} == {"plain"}
        header = reader._headers[0]
        assert header.data % 64 == 0
        for item in reader.items:
            assert header.entries[f"{item.name}/data"].start % item.dtype.itemsize == 0


def test_entry_names_never_collide(tmp_path: Path) -> None:
    x = torch.ones(3)
    names = ["__manifest__", "__metadata__", "a", "a/data", "a/data/data", "a#2"]
    tensors = {name: (x * i, Raw()) for i, name in enumerate(names)}
    tensors["a/data"] = (torch.randn(5000), Raw())  # packed: its entry would be the plain part of "a"
    write(tmp_path / "x.safetensors", tensors)
    with Reader(tmp_path / "x.safetensors") as reader:
        for name, (tensor, _) in tensors.items():
            assert torch.equal(reader.read(name).decode(backend="reference"), tensor)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 1200), min_size=1, max_size=60),
    seed=st.integers(0, 1 << 30),
    shard=st.none() | st.integers(1, 20_000),
)
def test_small_items_share_records(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int, shard: int | None
) -> None:
    """Of several dtypes, between large ones, over shards: each comes back alone and in any order."""
    g = torch.Generator().manual_seed(seed)
    kinds = (torch.float32, torch.int64, torch.bfloat16, torch.uint8)
    tensors = {f"t{i}": ((torch.randn(n, generator=g) * 9).to(kinds[n % 4]), Raw()) for i, n in enumerate(sizes)}
    path = tmp_path_factory.mktemp("small") / "x"
    written = write(path, tensors, max_shard_size=shard)
    with Reader(path) as reader:
        small = [i for i in reader.items if i.nbytes < 4096]
        assert all(item.storage == ("shared" if item.nbytes < 4096 else "packed") for item in reader.items)
        assert sum(item.stored_nbytes for item in reader.items) + 4096 * len(written.files) > written.nbytes - 20_000
        assert len({(i.record.shard, i.record.start) for i in small if i.record}) <= len(small)
        for name in sorted(tensors, reverse=True):
            assert bytes_of(reader.read(name).parts["data"]) == bytes_of(tensors[name][0])
        assert all(check.error is None for check in reader.verify())


@pytest.mark.parametrize("packing", ["none", "zstd"])
def test_large_items_in_chunks(tmp_path: Path, packing: str) -> None:
    tensors = {"rows": (torch.randn(1100, 1024), Raw()), "one row": (torch.randn(1, 2_100_001).half(), Raw())}
    write(tmp_path / "x.safetensors", tensors, packing=packing)
    with Reader(tmp_path / "x.safetensors") as reader:
        for i, (tensor, _) in enumerate(tensors.values()):
            chunks = reader.items[i].chunks
            assert len(chunks) >= 2
            for k, chunk in enumerate(chunks):
                out = {"data": torch.full(chunk.shape, math.nan, dtype=tensor.dtype)}
                assert reader.read_chunk(i, k, out)["data"] is out["data"]
                assert torch.equal(out["data"].view(-1), tensor.view(-1)[chunk.start : chunk.stop])


@settings(max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int16, torch.complex64]),
        min_size=6, max_size=6,
    ),
    packing=st.sampled_from(["none", "zstd"]),
    shard=st.none() | st.integers(1, 100_000),
    seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_any_shapes(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtypes: list[torch.dtype], packing: str,
    shard: int | None, seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False)):
        data = torch.randint(0, 4, (math.prod(shape) * dtype.itemsize,), generator=g).to(torch.uint8)
        tensors[f"t{i}"] = (data.view(dtype).view(shape) if data.numel() else torch.empty(shape, dtype=dtype), Raw())
    path = tmp_path_factory.mktemp("any") / "x"
    write(path, tensors, packing=packing, max_shard_size=shard)
    with Reader(path) as reader:
        for name, (tensor, _) in tensors.items():
            found = reader.read(name).parts["data"]
            assert found.shape == tensor.shape
            assert bytes_of(found) == bytes_of(tensor)


def test_reading_one_item_touches_only_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": (torch.randn(2000, 700), Raw()) for i in range(4)} | {"small": (torch.ones(10), Raw())}
    spans: list[tuple[int, int]] = []
    real = os.preadv

    def counted(fd: int, views: list[memoryview], offset: int) -> int:
        n = real(fd, views, offset)
        spans.append((offset, offset + n))
        return n

    monkeypatch.setattr(os, "preadv", counted)
    for packing in ("none", "zstd"):
        write(tmp_path / packing, tensors, packing=packing)
        with Reader(tmp_path / packing) as reader:
            for name in ("t2", "small"):
                spans.clear()
                reader.read(name)
                item = reader.items[reader.index(name)]
                entry = item.entry if packing == "zstd" else f"{item.entry}/data"
                low = reader._headers[0].data + reader._headers[0].entries[entry].start
                low += item.record.start if item.record else item.start
                assert sum(b - a for a, b in spans) == item.stored_nbytes
                assert all(low <= a and b <= low + item.stored_nbytes for a, b in spans)


def test_parts_may_be_reused_as_soon_as_pack_returns(tmp_path: Path) -> None:
    for packing in ("none", "zstd"):
        x = torch.randn(3, 4000)
        with Writer(
            tmp_path / packing, [ItemSpec("x", Encoding(Raw()), (3, 4000), FLOAT32)], packing=packing
        ) as writer:
            part = x.clone()
            packed = writer.pack(0, writer.chunks(0)[0], {"data": part})
            part.fill_(math.nan)
            writer.append(packed)
            writer.close({})
        with Reader(tmp_path / packing) as reader:
            assert torch.equal(reader.read("x").parts["data"], x)


def test_the_writer_refuses_misuse(tmp_path: Path) -> None:
    item = ItemSpec("x", Encoding(Raw()), (4, 2), FLOAT32)
    x = {"data": torch.ones(4, 2)}
    path = tmp_path / "x"
    with pytest.raises(UsageError, match="two items"):
        Writer(path, [item, item])
    with pytest.raises(UsageError, match="Unicode"):
        Writer(path, [ItemSpec("\ud800", Encoding(Raw()), (1,), FLOAT32)])
    with Writer(path, [item, ItemSpec("y", Encoding(Raw()), (4, 2), FLOAT32)]) as writer:
        chunk = writer.chunks(0)[0]
        with pytest.raises(UsageError, match="no chunk"):
            writer.pack(0, Chunk(0, 4, (2, 2)), {"data": torch.ones(2, 2)})
        with pytest.raises(UsageError, match="should have parts"):
            writer.pack(0, chunk, {"data": torch.ones(4, 3)})
        with pytest.raises(UsageError, match="should have parts"):
            writer.pack(0, chunk, {})
        with pytest.raises(UsageError, match="out of order"):
            writer.append(writer.pack(1, chunk, x))
        with pytest.raises(UsageError, match="has not been appended"):
            writer.close({})
        writer.append(writer.pack(0, chunk, x))
        writer.append(writer.pack(1, chunk, x))
        writer.set_attributes(1, {"error": math.nan})
        with pytest.raises(UsageError, match="JSON"):
            writer.close({})
    assert list(tmp_path.iterdir()) == []


def test_the_reader_refuses_misuse(tmp_path: Path) -> None:
    write(tmp_path / "x", {"x": (torch.ones(4), Raw())})
    with Reader(tmp_path / "x") as reader:
        with pytest.raises(UsageError, match="no item"):
            reader.read("y")
        with pytest.raises(UsageError, match="should have parts"):
            reader.read_chunk(0, 0, {"data": torch.ones(3)})
        with pytest.raises(UsageError, match="contiguous"):
            reader.read_chunk(0, 0, {"data": torch.ones(8)[::2]})
    for wrong in (tmp_path, tmp_path / "missing", tmp_path / "a\0b"):
        with pytest.raises(FormatError):
            Reader(wrong)


def test_packing_text() -> None:
    assert [str(Packing.parse(t)) for t in ("none", "zstd", "zstd:3", "zstd:-5")] == [
        "none",
        "zstd",
        "zstd:3",
        "zstd:-5",
    ]
    for wrong in ("", "gzip", "zstd:", "zstd:x", "zstd:99", "none:1"):
        with pytest.raises(UsageError):
            Packing.parse(wrong)


def test_threads_pack_and_one_appends(tmp_path: Path) -> None:
    """The same bytes as with one thread, whatever the number of threads; and reading is thread-safe too."""
    x = torch.randn(6000, 1000) * 0.02
    item = ItemSpec("x", Encoding(Raw()), (6000, 1000), FLOAT32)

    def run(path: Path, threads: int) -> bytes:
        with Writer(path, [item]) as writer, ThreadPoolExecutor(threads) as pool:
            pieces = writer.chunks(0)
            for packed in pool.map(
                lambda c: writer.pack(0, c, {"data": x.view(-1)[c.start : c.stop].view(c.shape)}), pieces
            ):
                writer.append(packed)
            writer.close({})
        return path.read_bytes()

    assert run(tmp_path / "a", 1) == run(tmp_path / "b", 4)
    with Reader(tmp_path / "a") as reader, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: reader.read_chunk(0, k)["data"], [*range(len(reader.items[0].chunks))] * 3))
        assert torch.equal(torch.cat(found[: len(found) // 3]), x)
        assert torch.equal(torch.cat(found), x.repeat(3, 1))


@pytest.mark.parametrize("packing", ["none", "zstd"])
def test_memory_does_not_grow_with_the_item(tmp_path: Path, packing: str) -> None:
    """A 512 MB tensor, written and read in chunks, stays within 64 MiB."""
    rows, cols = 32, 1 << 22
    piece = torch.zeros(1, 1 << 20)
    piece.view(-1)[::7] = 0.5
    writer = Writer(tmp_path / "x", [ItemSpec("x", Encoding(Raw()), (rows, cols), FLOAT32)], packing=packing)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    with writer:
        for chunk in writer.chunks(0):
            writer.append(writer.pack(0, chunk, {"data": piece}))
        writer.close({})
    with Reader(tmp_path / "x") as reader:
        out = {"data": torch.empty(1, 1 << 20)}
        for k in range(len(reader.items[0].chunks)):
            assert torch.equal(reader.read_chunk(0, k, out)["data"], piece)
    assert peak() - before < 64 << 20


def peak() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
