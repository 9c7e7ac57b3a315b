"""Files that lie, with every checksum right: refused by our own errors, without memory to match their claims."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from statecodec.buffers import Pool
from statecodec.codecs import Codec, Raw, parse
from statecodec.errors import CorruptFile, FormatError, LimitExceeded, UnsupportedVersion, UsageError
from statecodec.format import Limits, Reader
from statecodec.format.packing import Packing, decode_record, encode_record
from tests.format.support import build, forge, join_file, sample, split_file, write, write_old

BIG = 1 << 60
Change = Callable[[dict[str, Any]], Any]


def refused(
    path: Path, data: bytes, kind: type[FormatError] = FormatError, match: str = "", limits: Any = None
) -> None:
    """Opening and verifying must raise `kind`, in less than 64 MiB."""
    path.write_bytes(data)
    before = _peak(reset=True)
    with pytest.raises(kind, match=match or None):
        read_all(path, limits)
    assert _peak() - before < 64 << 20


def read_all(path: Path, limits: Limits | None = None) -> None:
    with Reader(path, limits) as reader:
        for check in reader.verify():
            if check.error:
                raise check.error
        for item_ in reader.items:
            reader.read(item_.name)


def _peak(reset: bool = False) -> int:
    """Peak resident bytes of this process, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    tensors = {"w": (torch.randn(100, 30), Raw()), "b": (torch.ones(3), Raw())}
    return write_old(tmp_path / "good", tensors).read_bytes()


def item(data: bytes = b"", **fields: Any) -> dict[str, Any]:
    """A manifest item, packed as one chunk, of a uint8 vector; `fields` replace its own."""
    shape = fields.get("shape", [len(data)])
    value = {
        "name": "x", "shard": 0, "codec": {"name": "raw", "version": 1}, "dtype": "uint8", "shape": shape,
        "storage": "packed", "parts": {"data": {"dtype": fields.get("dtype", "uint8"), "shape": shape}},
        "chunks": [{"shape": shape, "nbytes": len(data), "checksum": xxhash.xxh3_64_hexdigest(data)}],
        "attributes": {},
    }  # fmt: skip
    return {**value, **fields}


def packed(record: bytes, shape: list[int], **fields: Any) -> bytes:
    return build([item(record, shape=shape, **fields)], {"x": ("U8", [len(record)], record)})


def row(method: int, payload: bytes, length: int | None = None) -> bytes:
    return struct.pack("<BI", method, len(payload) if length is None else length) + payload


def test_the_forge_itself_is_sound(tmp_path: Path, good: bytes) -> None:
    for data in (forge(good, lambda m: m), packed(row(0, b"abc"), [3]), packed(row(2, b"a"), [1000])):
        (tmp_path / "x").write_bytes(data)
        with Reader(tmp_path / "x") as reader:
            assert [c.error for c in reader.verify()] == [None] * len(reader.items)


# Headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 8, b"PK\3\4" + b"\0" * 100, struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"null", struct.pack("<Q", 3) + b"{\xff}",
        struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 600_000) + b'{"a":' * 100_000 + b"1" * 100_000,
        join_file(b'{"__metadata__":{"format":"pt"},"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""),
        join_file(b'{"__metadata__":{"format":"statecodec"}}', b""),
    ],
    ids=range(12),
)  # fmt: skip
def test_not_our_files(tmp_path: Path, data: bytes) -> None:
    refused(tmp_path / "x", data)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", 1 << 34))
        f.truncate((1 << 34) + 8)
    with pytest.raises(LimitExceeded):
        Reader(path)


def _header(name: str, **fields: Any) -> Change:
    def change(header: dict[str, Any]) -> None:
        header.setdefault(name, {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}).update(fields)

    return change


HEADER_LIES: dict[str, Change] = {
    "dtype": _header("b/data", dtype="I32"),
    "unknown dtype": _header("b/data", dtype="X9"),
    "shape": _header("b/data", shape=[1, 3]),
    "negative": _header("b/data", shape=[-3]),
    "float": _header("b/data", shape=[3.0]),
    "bool": _header("b/data", shape=[True, 3]),
    "product": _header("b/data", shape=[1 << 40, 1 << 40]),
    "zero elements": _header("b/data", shape=[0, BIG]),
    "hole": _header("b/data", data_offsets=[4, 16]),
    "backwards": _header("b/data", data_offsets=[12, 0]),
    "extra field": _header("b/data", more=1),
    "extra entry": _header("more"),
    "missing entry": lambda h: h.pop("b/data") and None,
    "manifest beyond the end": _header("__manifest__", data_offsets=[0, BIG], shape=[BIG]),
    "metadata": lambda h: h["__metadata__"].update(other=1),
    "no manifest": lambda h: h["__metadata__"].pop("statecodec.manifest") and None,
    "major version": lambda h: h["__metadata__"].update({"statecodec.version": "3.0"}),
    "bad version": lambda h: h["__metadata__"].update({"statecodec.version": "1"}),
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_header_lies(tmp_path: Path, good: bytes, lie: str) -> None:
    header, body = split_file(good)
    HEADER_LIES[lie](header)
    refused(tmp_path / "x", join_file(header, body), UnsupportedVersion if lie == "major version" else FormatError)


def test_duplicate_header_keys(tmp_path: Path, good: bytes) -> None:
    header, body = split_file(good)
    text = json.dumps(header, separators=(",", ":")).encode()
    entry = json.dumps(header["b/data"]).encode()
    refused(tmp_path / "x", join_file(text[:-1] + b',"b/data":' + entry + b"}", body), match="duplicate key")


# Manifests -------------------------------------------------------------------------------------------------------


def _item(**fields: Any) -> Change:
    return lambda m: m["items"][0].update(fields)


def _chunk(**fields: Any) -> Change:
    return lambda m: m["items"][0]["chunks"][0].update(fields)


def _all_shapes(shape: list[int]) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        first = manifest["items"][0]
        first["shape"] = first["parts"]["data"]["shape"] = first["chunks"][0]["shape"] = shape

    return change


MANIFEST_LIES: dict[str, tuple[Change, type[FormatError]]] = {
    "format": (lambda m: m.update(format="x"), FormatError),
    "version": (lambda m: m.update(format_version=[1, 2]), FormatError),
    "version type": (lambda m: m.update(format_version="1.0"), FormatError),
    "unknown field": (lambda m: m.update(more=1), FormatError),
    "not an object": (lambda m: [m], FormatError),
    "items": (lambda m: m.update(items={}), FormatError),
    "item": (lambda m: m.update(items=[1]), FormatError),
    "same name": (lambda m: m["items"].append(m["items"][0]), FormatError),
    "same entry": (lambda m: m["items"].append({**m["items"][0], "name": "z", "entry": "w"}), FormatError),
    "entry is the manifest": (_item(entry="__manifest__"), FormatError),
    "document": (lambda m: m.update(document=[]), FormatError),
    "item field": (_item(more=1), FormatError),
    "no name": (lambda m: m["items"][0].pop("name") and None, FormatError),
    "name type": (_item(name=7), FormatError),
    "shard": (_item(shard=1), FormatError),
    "shard type": (_item(shard=True), FormatError),
    "negative shard": (_item(shard=-1), FormatError),
    "codec": (_item(codec={"name": "zstd99", "version": 1}), UnsupportedVersion),
    "codec version": (_item(codec={"name": "raw", "version": 2}), UnsupportedVersion),
    "codec field": (_item(codec={"name": "raw", "version": 1, "x": 1}), FormatError),
    "codec type": (_item(codec="raw"), FormatError),
    "codec without name": (_item(codec={}), FormatError),
    "codec that does not fit": (_item(codec={"name": "split", "version": 1}), FormatError),
    "dtype": (_item(dtype="float31"), UnsupportedVersion),
    "other dtype": (_item(dtype="int32"), FormatError),
    "storage": (_item(storage="elsewhere"), UnsupportedVersion),
    "plain storage": (_item(storage="plain"), FormatError),
    "other shape": (_all_shapes([30, 101]), FormatError),
    "2**60 elements": (_all_shapes([BIG]), LimitExceeded),
    "2**60 x 0 elements": (_all_shapes([BIG, 0]), LimitExceeded),
    "2**62 x 2**62": (_all_shapes([1 << 62, 1 << 62]), FormatError),
    "2**80": (_all_shapes([1 << 80]), FormatError),
    "100 dimensions": (_all_shapes([1] * 100), FormatError),
    "1 GB": (_all_shapes([1 << 28]), LimitExceeded),
    "no chunks": (_item(chunks=[]), FormatError),
    "chunk nbytes": (_chunk(nbytes=10), FormatError),
    "chunk nbytes huge": (_chunk(nbytes=BIG), FormatError),
    "chunk checksum": (_chunk(checksum="0" * 16), CorruptFile),
    "chunk checksum case": (_chunk(checksum="A" * 16), FormatError),
    "chunk checksum type": (_chunk(checksum=5), FormatError),
    "attributes": (_item(attributes=None), FormatError),
    "parts": (_item(parts={}), FormatError),
    "shard path": (lambda m: m.update(shards=[{"file": "../x", "header": "0" * 16}]), FormatError),
    "shard fifo": (lambda m: m.update(shards=[{"file": "fifo", "header": "0" * 16}]), FormatError),
    "shard itself": (lambda m: m.update(shards=[{"file": "x", "header": "0" * 16}]), FormatError),
}


@pytest.mark.parametrize("lie", MANIFEST_LIES)
def test_manifest_lies(tmp_path: Path, good: bytes, lie: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    change, kind = MANIFEST_LIES[lie]
    refused(tmp_path / "x", forge(good, change), kind)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"document":', b'"document":{},"document":'), (b'"note":"test"', b'"note":NaN'),
        (b'"note":"test"', b'"note":1e999'),
        (b'"note":"test"', b'"note":' + b"9" * 10_000), (b'"note":"test"', b'"note":' + b"[" * 5000 + b"]" * 5000),
        (b'"note":"test"', b'"note":"' + b"\\" * 99_999), (b'"note":"test"', b'"note":"\xff"'), (b'"note"', b"note"),
        (b'"note":"test"', b'"note":[' + b"[]," * 4_000_001 + b"1]"),
    ],
    ids=range(9),
)  # fmt: skip
def test_manifest_text(tmp_path: Path, good: bytes, old: bytes, new: bytes) -> None:
    assert old in good
    refused(tmp_path / "x", forge(good, lambda m: m, lambda text: text.replace(old, new)))


def test_newer_minor_versions_may_add_fields(tmp_path: Path, good: bytes) -> None:
    def newer(m: dict[str, Any]) -> None:
        m.update(format_version=[1, 7], more=1)
        m["items"][0].update(more=1)
        m["items"][0]["chunks"][0].update(more=1)

    header, body = split_file(forge(good, newer))
    header["__metadata__"]["statecodec.version"] = "1.7"
    (tmp_path / "x").write_bytes(join_file(header, body))
    with Reader(tmp_path / "x") as reader:
        assert reader.format_version == (1, 7)
        assert [c.error for c in reader.verify()] == [None, None]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_items": 1}, {"max_header_bytes": 100}, {"max_manifest_bytes": 100}, {"max_decoded_bytes": 12_000},
        {"max_json_values": 10}, {"max_json_depth": 2}, {"max_shards": 0},
    ],
    ids=str,
)  # fmt: skip
def test_limits(tmp_path: Path, good: bytes, limits: dict[str, int]) -> None:
    refused(tmp_path / "x", good, LimitExceeded, limits=Limits(**limits))


# Bombs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["dropped", "folded", "shared", "lowrank"])
def test_codecs_that_expand(tmp_path: Path, codec: str) -> None:
    tensors = {"x": (torch.zeros(64, 64), _codec(codec))}
    data = write_old(tmp_path / "x", tensors, packing="none").read_bytes()
    shape = [1 << 30, 1 << 30]

    def change(m: dict[str, Any]) -> None:
        m["items"][0].update(shape=shape)
        m["items"][0]["chunks"][0]["shape"] = shape

    refused(tmp_path / "y", forge(data, change), LimitExceeded)


def _codec(name: str) -> Codec:
    return parse({"shared": "shared(dims=[0])", "lowrank": "lowrank(rank=2)"}.get(name, name))


def test_records_that_lie(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(1000)
    good, n = zstandard.compress(b"a" * 1000), [1000]
    for record, shape in [
        (b"", n), (b"\0" * 4, n), (row(0, noise[:999]), n), (row(0, noise + b"x"), n), (row(0, noise) + b"x", n),
        (row(1, good), [999]), (row(1, good), [1001]), (row(1, good), [1 << 25]), (row(1, good[:-1]), n),
        (row(1, b""), n), (row(1, b"x" * 20), n), (row(1, noise), n), (row(2, b""), n), (row(2, b"ab"), n),
        (row(2, b"a"), [1]), (row(3, noise), n), (row(255, noise), n), (row(0, noise, 0xFFFFFFFF), n),
        (row(1, zstandard.ZstdCompressor(write_content_size=False).compress(b"a" * 1000)), n),
        (row(1, b"\x50\x2a\x4d\x18\x04\0\0\0abcd"), n),
    ]:  # fmt: skip
        refused(tmp_path / "x", packed(record, shape))


def narrowed(n: int = 4096, dtype: torch.dtype = torch.int16) -> tuple[bytearray, torch.Tensor]:
    """A record of narrowed codes, with exceptions, and the codes."""
    codes = (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 30).round().to(dtype)
    codes[5], codes[n // 2] = 3000, -3000
    buffer, length = encode_record([codes], Packing(), Pool())
    assert buffer[0] == 5
    return bytearray(buffer[:length].tobytes()), codes


def unpack(record: bytes, n: int, dtype: torch.dtype = torch.int16) -> torch.Tensor:
    out = torch.zeros(n, dtype=dtype)
    decode_record(np.frombuffer(record, np.uint8), [out], Pool())
    return out


def test_narrowed_codes_that_lie() -> None:
    record, codes = narrowed()
    n, head = len(codes), 10  # two rows
    assert torch.equal(unpack(record, n), codes)
    header = struct.unpack_from("<BBII", record, head)
    for lie in (
        (2, *header[1:]), (1 - header[0], *header[1:]), (header[0], 3, *header[2:]), (header[0], 8, *header[2:]),
        (*header[:2], 7, header[3]), (*header[:2], 1 << 31, header[3]),
        (*header[:3], n), (*header[:3], 3), (*header[:3], 1),
    ):  # fmt: skip
        wrong = bytearray(record)
        struct.pack_into("<BBII", wrong, head, *lie)
        with pytest.raises(FormatError):
            unpack(wrong, n)
    for wrong_rows in (row(5, b"")[:5] + row(6, b"")[:5], struct.pack("<BIBI", 5, len(record) - 10, 6, 1)):
        with pytest.raises(FormatError):
            unpack(wrong_rows + record[10:], n)
    for at, method in ((0, 6), (5, 5), (head + 10, 5), (head + 10 + 5, 6)):  # where it must not be
        wrong = bytearray(record)
        wrong[at] = method
        with pytest.raises(FormatError):
            unpack(wrong, n)
    with pytest.raises(FormatError):
        unpack(record, n // 2)
    with pytest.raises(FormatError):  # neither of bytes nor of 64-bit numbers
        unpack(row(5, record[10:]), 2 * n, torch.uint8)
    small = row(5, record[head : head + 40]) + row(6, b"")
    with pytest.raises(FormatError):
        unpack(small, 63)


def predicted() -> tuple[bytearray, torch.Tensor]:
    """A record of predicted codes, 200 x 180, and the codes."""
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(200, 2, generator=generator) @ torch.randn(2, 180, generator=generator)
    codes = (30 * product + 3 * torch.randn(200, 180, generator=generator)).round().to(torch.int16)
    buffer, length = encode_record([codes], Packing("predicted"), Pool())
    assert buffer[0] == 7
    return bytearray(buffer[:length].tobytes()), codes


def test_predicted_codes_that_lie() -> None:
    record, codes = predicted()
    n, head, inner = codes.numel(), 10, 16  # two rows, and the header behind them
    assert torch.equal(unpack(record, n), codes.view(-1))
    rank, shift, cols = struct.unpack_from("<BBI", record, head)
    for lie in (
        (0, shift, cols), (65, shift, cols), (255, shift, cols), (rank, 24, cols), (rank, 255, cols), (rank, shift, 0),
        (rank, shift, 181), (rank, shift, 1), (rank, shift, n), (rank, shift, (1 << 32) - 1), (64, shift, 2),
        (rank + 1, shift, cols), (rank, shift, 360),
    ):  # fmt: skip
        wrong = bytearray(record)
        struct.pack_into("<BBI", wrong, head, *lie)
        with pytest.raises(FormatError):
            unpack(wrong, n)
    for at, method in ((0, 6), (5, 7), (5, 5), (inner, 7), (inner + 10, 7), (inner + 15, 7)):  # where it must not be
        wrong = bytearray(record)
        wrong[at] = method
        with pytest.raises(FormatError):
            unpack(wrong, n)
    for short in (record[: head + 3], record[:inner], record[:-1]):
        with pytest.raises(FormatError):
            unpack(short, n)
    with pytest.raises(FormatError):
        unpack(record, n // 2)
    large = torch.full((2 * 380,), 2048, dtype=torch.int16)  # numbers that fit, and products that do not
    for factors, fits in ((large, False), (large // 2, True)):
        body, length = encode_record([factors, codes], Packing(), Pool())
        forged = row(7, struct.pack("<BBI", 2, 0, cols) + body[:length].tobytes())
        forged = bytearray(forged[:5] + row(6, b"") + forged[5:])
        with contextlib.nullcontext() if fits else pytest.raises(FormatError, match="out of range"):
            unpack(forged, n)


@settings(max_examples=100)
@given(st.data())
def test_damaged_predicted_codes_are_errors_or_codes(data: st.DataObject) -> None:
    record, codes = predicted()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 60) | st.integers(0, len(record) - 1))
        record[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        unpack(record[: data.draw(st.integers(0, len(record)))] if data.draw(st.booleans()) else record, codes.numel())


@settings(max_examples=300)
@given(st.data())
def test_damaged_narrowed_codes_are_errors_or_codes(data: st.DataObject) -> None:
    """Whatever stands in a record whose checksum is right: an error of ours, or numbers."""
    dtype = data.draw(st.sampled_from([torch.int16, torch.int32]))
    record, codes = narrowed(640, dtype)
    for _ in range(data.draw(st.integers(1, 4))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        unpack(record[: data.draw(st.integers(0, len(record)))] if data.draw(st.booleans()) else record, 640, dtype)
    assert len(codes) == 640


@pytest.mark.parametrize(("kind", "role"), [("direction", "exp_avg_sq"), ("following", "weight")])
def test_companions_that_lie(kind: str, role: str, tmp_path: Path) -> None:
    """Of another shape or dtype, of each other, of themselves, of what is not there."""
    x, codec = torch.rand(80, 60) + 0.1, parse(kind)
    tensors: dict[str, tuple[torch.Tensor, Codec]] = {
        "m": (torch.randn(80, 60), codec), "n": (torch.randn(80, 60), codec), "v": (x, parse("logarithmic")),
        "other": (torch.rand(60, 80), Raw()), "ids": (torch.ones(80, 60, dtype=torch.int32), Raw()),
    }  # fmt: skip
    named = {name: {role: "v"} for name in ("m", "n")}
    data = write_old(tmp_path / "x", tensors, companions=named).read_bytes()
    read_all(tmp_path / "x")
    lies: list[Any] = [
        {}, None, "v", {role: 3}, {role: "gone"}, {role: "other"}, {role: "ids"}, {role: "m"}, {role: "n"},
        {role: "v", "more": "v"}, {"more": "v"},
    ]  # fmt: skip
    for lie in lies:
        refused(tmp_path / "y", forge(data, lambda m, lie=lie: m["items"][0].update(companions=lie)))  # type: ignore[misc]
    refused(tmp_path / "y", forge(data, lambda m: m["items"][0].pop("companions") and None))
    refused(tmp_path / "y", forge(data, lambda m: m["items"][2].update(companions={role: "m"})))


def test_repetitions_that_lie(tmp_path: Path) -> None:
    """Of another tensor, dtype or shape, of each other, of themselves, of what is not there."""
    x = torch.randn(80, 60)
    v = x.square() + 0.1
    tensors: dict[str, tuple[torch.Tensor, Codec]] = {
        "a": (x, parse("same")), "b": (x, parse("same")), "m": (x, parse("direction")), "v": (v, parse("logarithmic")),
        "half": (x.half(), Raw()), "flat": (x.reshape(60, 80), Raw()), "ids": (x.view(torch.int32), Raw()),
    }  # fmt: skip
    named = {"a": {"original": "m"}, "b": {"original": "m"}, "m": {"exp_avg_sq": "v"}}
    data = write_old(tmp_path / "x", tensors, companions=named).read_bytes()
    read_all(tmp_path / "x")
    lies: list[Any] = [
        {}, None, {"original": 3}, {"original": "gone"}, {"original": "half"}, {"original": "flat"},
        {"original": "ids"}, {"original": "a"}, {"original": "b"}, {"original": "m", "more": "m"}, {"exp_avg_sq": "v"},
    ]  # fmt: skip
    for lie in lies:
        refused(tmp_path / "y", forge(data, lambda m, lie=lie: m["items"][0].update(companions=lie)))  # type: ignore[misc]
    refused(tmp_path / "y", forge(data, lambda m: m["items"][2].update(companions={"exp_avg_sq": "a"})))


def test_the_writer_refuses_companions_that_are_not_there(tmp_path: Path) -> None:
    x = (torch.rand(80, 60), parse("direction"))
    for companions in ({}, {"exp_avg_sq": "gone"}, {"exp_avg_sq": "short"}, {"exp_avg_sq": "m"}):
        with pytest.raises(UsageError, match="needs the exp_avg_sq"):
            write(tmp_path / "x", {"m": x, "short": (torch.rand(3), Raw())}, companions={"m": companions})
    assert not list(tmp_path.iterdir())


def test_zstd_frames_that_lie_about_their_size(tmp_path: Path) -> None:
    bomb = zstandard.compress(bytes(1 << 28))
    refused(tmp_path / "x", packed(row(1, bomb), [1 << 20]), match="expected 1048576 bytes")
    claim = b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", BIG) + b"\x01\0\0"
    refused(tmp_path / "x", packed(row(1, claim), [1 << 20]))
    # Says 1 MiB, holds 256 MiB: the declared size fits, the contents must not get further.
    lying = bytearray(zstandard.ZstdCompressor(write_content_size=True).compress(bytes(1 << 28)))
    descriptor = lying[4]
    assert descriptor >> 6 == 2, "a four-byte size was expected here"
    at = 5 + (0 if descriptor & 0x20 else 1)
    lying[at : at + 4] = struct.pack("<I", 1 << 20)
    for cut in (len(lying), len(lying) - 1):  # whole, and cut short
        refused(tmp_path / "x", packed(row(1, bytes(lying[:cut])), [1 << 20]))


def test_no_record_expands_beyond_the_format_s_bound(tmp_path: Path) -> None:
    refused(tmp_path / "x", packed(row(2, b"a"), [(64 << 20) + 1]), LimitExceeded)
    window = zstandard.ZstdCompressionParameters(window_log=27, strategy=1)
    frame = zstandard.ZstdCompressor(compression_params=window).compress(random.Random(0).randbytes(1 << 16) * 300)
    refused(tmp_path / "x", packed(row(1, frame), [300 << 16]), match="window")


def test_chunks_must_tile_the_item(tmp_path: Path) -> None:
    data = write_old(tmp_path / "g", {"x": (torch.randn(1100, 1024), Raw())}).read_bytes()

    def lie(change: Callable[[list[dict[str, Any]]], Any]) -> bytes:
        def on(m: dict[str, Any]) -> None:
            chunks = m["items"][0]["chunks"]
            m["items"][0]["chunks"] = change(chunks) or chunks

        return forge(data, on)

    for change in (
        lambda c: c[:1], lambda c: c[::-1], lambda c: [*c, c[0]], lambda c: [c[0], c[0]],
        lambda c: c[0].update(shape=[1, c[0]["shape"][0] * 1024]), lambda c: c[0].update(shape=[1023, 1025]),
        lambda c: c[0].update(shape=[0, 1024]), lambda c: c[0].update(shape=[1024]), lambda c: c[0].update(nbytes=7),
    ):  # fmt: skip
        refused(tmp_path / "x", lie(change))


def test_chunks_of_an_item_without_parts_must_tile_it_too(tmp_path: Path) -> None:
    data = write_old(tmp_path / "g", {"x": (torch.zeros(64, 64), parse("dropped"))}).read_bytes()

    def change(m: dict[str, Any]) -> None:
        m["items"][0]["chunks"] = [{"shape": [1, 64], "checksums": []}] * 2

    refused(tmp_path / "x", forge(data, change), match="add up")


def test_mutated_manifests_raise_only_our_errors(tmp_path: Path) -> None:
    """Random JSON surgery with valid digests: whatever happens, it is a FormatError or a readable file."""
    data = write_old(tmp_path / "g", sample(), document={"a": [1, {"b": None}]}).read_bytes()
    rng = random.Random(5)
    junk: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        1 << 40,
        1 << 70,
        1.5,
        "",
        "x",
        "0" * 16,
        [],
        [0],
        {},
        {"name": "raw"},
        [[]],
    ]

    def mutate(m: dict[str, Any]) -> None:
        for _ in range(rng.choice([1, 1, 2, 5])):
            node: Any = m
            while True:
                keys = list(node) if isinstance(node, dict) else list(range(len(node)))
                if not keys:
                    break
                key = rng.choice(keys)
                if isinstance(node[key], dict | list) and rng.random() < 0.85:
                    node = node[key]
                    continue
                if rng.random() < 0.2:
                    del node[key]
                else:
                    node[key] = rng.choice(junk)
                break

    raised = 0
    for _ in range(400):
        (tmp_path / "x").write_bytes(forge(data, mutate))
        try:
            read_all(tmp_path / "x")
        except FormatError:
            raised += 1
    assert raised > 200
