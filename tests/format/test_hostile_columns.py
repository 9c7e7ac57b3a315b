"""Manifests of format 2.0 that lie, with every checksum right: refused by our own errors, in little memory."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import zstandard

from statecodec.codecs import Encoding, Raw, parse
from statecodec.dtypes import FLOAT32, FLOAT64, UINT8
from statecodec.errors import CorruptFile, FormatError, LimitExceeded, UnsupportedVersion, UsageError
from statecodec.format import ItemSpec, Limits, Reader, Writer
from tests.format.support import forge, join_file, sample, split_file, write
from tests.format.test_hostile import read_all, refused

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    """Two packed items, one of several chunks, three small ones in two records, one without parts."""
    tensors = {
        "large": (torch.randn(1100, 1024), Raw()), "w": (torch.randn(100, 30), Raw()), "a": (torch.ones(3), Raw()),
        "b": (torch.arange(5), Raw()), "c": (torch.ones(7), Raw()), "gone": (torch.zeros(64, 64), parse("dropped")),
    }  # fmt: skip
    return write(tmp_path / "good", tensors).path.read_bytes()


def at(*path: Any, to: Any) -> Change:
    """A lie that sets what stands at the end of `path`."""
    *keys, last = path

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys:
            place = place[key]
        place[last] = to

    return change


def form(of: str, **fields: Any) -> Change:
    """A lie in the first form of a storage."""

    def change(manifest: dict[str, Any]) -> None:
        next(f for f in manifest["forms"] if f["storage"] == of).update(fields)

    return change


def huge(shape: list[int]) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        first = next(f for f in manifest["forms"] if f["storage"] == "packed")
        first["shape"] = first["parts"]["data"]["shape"] = shape
        first["chunks"] = [[1, shape]]

    return change


LIES: dict[str, tuple[Change, type[FormatError]]] = {
    "unknown field": (at("more", to=1), FormatError),
    "unknown field of items": (at("items", "more", to=1), FormatError),
    "unknown field of records": (at("records", "more", to=1), FormatError),
    "unknown field of a form": (form("packed", more=1), FormatError),
    "rows": (at("items", to=[]), FormatError),
    "no forms": (at("forms", to=[]), FormatError),
    "form of another kind": (at("forms", 0, to=3), FormatError),
    "codec": (form("packed", codec={"name": "zstd99", "version": 1}), UnsupportedVersion),
    "codec that does not fit": (form("packed", codec={"name": "split", "version": 1}), FormatError),
    "storage": (form("packed", storage="elsewhere"), UnsupportedVersion),
    "dtype": (form("packed", dtype="float31"), UnsupportedVersion),
    "parts": (form("packed", parts={}), FormatError),
    "no chunks": (form("packed", chunks=[]), FormatError),
    "chunks that are no runs": (form("packed", chunks=[[100, 30]]), FormatError),
    "a run of none": (form("packed", chunks=[[0, [1024, 1024]]]), FormatError),
    "fewer chunks": (form("packed", chunks=[[1, [1024, 1024]]]), FormatError),
    "chunks that do not tile": (form("packed", chunks=[[2, [550, 1025]]]), FormatError),
    "chunks without end": (form("plain", chunks=[[1 << 40, [1, 1]]]), FormatError),
    "a shared item in chunks": (form("shared", chunks=[[1, [1]], [1, [2]]]), FormatError),
    "packed as shared": (form("packed", storage="shared"), FormatError),
    "shared as packed": (form("shared", storage="packed"), FormatError),
    "shared as plain": (form("shared", storage="plain"), FormatError),
    "2**60 elements": (huge([1 << 60]), LimitExceeded),
    "2**60 x 0 elements": (huge([1 << 60, 0]), LimitExceeded),
    "1 GB": (huge([1 << 28]), LimitExceeded),
    "a name that is no text": (at("items", "name", 0, to=3), FormatError),
    "same name": (at("items", "name", 0, to="w"), FormatError),
    "fewer names": (lambda m: m["items"]["name"].pop() and None, FormatError),
    "form number": (at("items", "form", 0, to=100), FormatError),
    "negative form": (at("items", "form", 0, to=-1), FormatError),
    "form that is a bool": (at("items", "form", 0, to=True), FormatError),
    "another form": (at("items", "form", 1, to=0), FormatError),
    "more shards": (at("items", "shards", to=[3, 3]), FormatError),
    "fewer items": (at("items", "shards", to=[5]), FormatError),
    "negative items": (at("items", "shards", to=[-6]), FormatError),
    "entry of no item": (at("items", "entry", to=[[100, "x"]]), FormatError),
    "entries that fall": (at("items", "entry", to=[[5, "x"], [4, "y"]]), FormatError),
    "entry that is no text": (at("items", "entry", to=[[5, 5]]), FormatError),
    "companions of nobody": (at("items", "companions", to=[[0, {"exp_avg_sq": "w"}]]), FormatError),
    "attribute": (at("items", "attributes", "role", to=["other"]), FormatError),
    "attribute values": (at("items", "attributes", "role", to={"values": ["other"]}), FormatError),
    "attribute of no item": (at("items", "attributes", "role", to={"items": [100], "values": [1]}), FormatError),
    "attribute twice": (at("items", "attributes", "role", to={"items": [1, 1], "values": [1, 2]}), FormatError),
    "record bytes": (at("records", "nbytes", 0, to=10), FormatError),
    "negative record": (at("records", "nbytes", 0, to=-1), FormatError),
    "record of 2**60 bytes": (at("records", "nbytes", 0, to=1 << 60), FormatError),
    "one more record": (lambda m: m["records"]["nbytes"].append(0), FormatError),
    "one fewer record": (lambda m: m["records"]["nbytes"].pop() and None, FormatError),
    "checksums": (at("records", "checksums", to=""), FormatError),
    "checksum case": (
        lambda m: m["records"].update(checksums=m["records"]["checksums"].upper() + "A" * 16),
        FormatError,
    ),
    "wrong checksums": (lambda m: m["records"].update(checksums="0" * len(m["records"]["checksums"])), CorruptFile),
    "nobody shares": (at("records", "shared", to=[]), FormatError),
    "all share": (lambda m: m["records"]["shared"][0].__setitem__(1, 100), FormatError),
    "nobody shares a record": (lambda m: m["records"]["shared"][0].__setitem__(1, 0), FormatError),
    "fewer share": (lambda m: m["records"]["shared"][0].__setitem__(1, 1), FormatError),
    "a record in the middle of an item": (lambda m: m["records"]["shared"][0].__setitem__(0, 1), FormatError),
    "a shared record beyond the last": (lambda m: m["records"]["shared"][0].__setitem__(0, 100), FormatError),
    "plain checksums": (at("plain", to="0" * 16), FormatError),
    "plain checksums that are none": (at("plain", to="xyz"), FormatError),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(tmp_path: Path, good: bytes, lie: str) -> None:
    change, kind = LIES[lie]
    refused(tmp_path / "x", forge(good, change), kind)


def test_the_forge_itself_is_sound(tmp_path: Path, good: bytes) -> None:
    (tmp_path / "x").write_bytes(forge(good, lambda manifest: manifest))
    read_all(tmp_path / "x")


def with_manifest(good: bytes, data: bytes) -> bytes:
    header, body = split_file(good)
    start, _ = header["__manifest__"]["data_offsets"]
    header["__manifest__"] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [start, start + len(data)]}
    header["__metadata__"]["statecodec.manifest"] = xxhash.xxh3_128_hexdigest(data)
    return join_file(header, body[:start] + data)


@pytest.mark.parametrize(
    "data",
    [
        lambda: zstandard.compress(b" " * (1 << 30)),
        lambda: zstandard.compress(b'{"a":[' + b"[]," * 2_000_000 + b"1]}"),
        lambda: zstandard.ZstdCompressor(write_content_size=False).compress(b"{}"),
        lambda: zstandard.compress(b"{}")[:-1],
        lambda: zstandard.compress(b"{}") + b"x",
        lambda: zstandard.compress(b"not JSON"),
        lambda: b"\x28\xb5\x2f\xfd",
        lambda: b"",
    ],
    ids=range(8),
)
def test_compressed_manifests(tmp_path: Path, good: bytes, data: Callable[[], bytes]) -> None:
    refused(tmp_path / "x", with_manifest(good, data()))


def test_shared_records_are_bounded(tmp_path: Path) -> None:
    """Small items do not add up to a record larger than a reader unpacks for one of them."""
    data = write(tmp_path / "g", {f"t{i}": (torch.zeros(900), Raw()) for i in range(4)}).path.read_bytes()

    def change(manifest: dict[str, Any]) -> None:
        first = manifest["forms"][0]
        first["shape"] = first["parts"]["data"]["shape"] = [100_000]
        first["chunks"] = [[1, [100_000]]]

    refused(tmp_path / "x", forge(data, change), match="share a record")


def test_mutated_manifests_raise_only_our_errors(tmp_path: Path) -> None:
    """Random JSON surgery with valid digests: whatever happens, it is a FormatError or a readable file."""
    data = write(tmp_path / "g", sample(), document={"a": [1, {"b": None}]}).path.read_bytes()
    rng = random.Random(6)
    junk: list[Any] = [
        None, True, -1, 0, 1, 1 << 40, 1 << 70, 1.5, "", "x", "0" * 16, [], [0], {}, {"name": "raw"}, [[0, 1]],
    ]  # fmt: skip

    def mutate(manifest: dict[str, Any]) -> None:
        for _ in range(rng.randint(1, 3)):
            place: Any = manifest
            while isinstance(place, dict | list) and place:
                key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
                if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.25:
                    place[key] = copy.deepcopy(rng.choice(junk))
                    break
                place = place[key]

    for _ in range(400):
        (tmp_path / "x").write_bytes(forge(data, mutate))
        with contextlib.suppress(FormatError):
            read_all(tmp_path / "x")


@pytest.mark.parametrize(
    ("item", "match"),
    [
        (ItemSpec("x", Encoding(Raw()), (1 << 43,), FLOAT64), "decoded bytes"),
        (ItemSpec("x", Encoding(parse("dropped")), (1 << 62,), UINT8), "decoded bytes"),
        (ItemSpec("x", Encoding(parse("shared(dims=[0])")), (1 << 20, 1 << 14), FLOAT32), "decoded bytes of one chunk"),
        (ItemSpec("x", Encoding(Raw()), (1,) * 65, UINT8), "cannot be stored"),
    ],
    ids=range(4),
)
def test_the_writer_refuses_before_it_writes(tmp_path: Path, item: ItemSpec, match: str) -> None:
    with pytest.raises((LimitExceeded, UsageError), match=match):
        Writer(tmp_path / "x", [item])
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_too_many_items(tmp_path: Path) -> None:
    with pytest.raises(LimitExceeded, match="items"):
        Writer(tmp_path / "x", [ItemSpec("x", Encoding(Raw()), (0,), UINT8)] * ((1 << 21) + 1))
    assert list(tmp_path.iterdir()) == []


def test_the_writer_reads_what_it_wrote_before_anybody_else_can(tmp_path: Path) -> None:
    """Whatever a reader would not take, the writer does not publish."""
    deep: Any = 1
    for _ in range(Limits().max_json_depth + 1):
        deep = [deep]
    with pytest.raises(UsageError, match=r"readers would refuse the output: .*depth"):
        write(tmp_path / "x", {"x": (torch.ones(3), Raw())}, document={"deep": deep})
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_is_a_small_part_of_a_file_of_many_small_tensors(tmp_path: Path) -> None:
    tensors = {f"layers.{i // 10}.experts.{i % 10}.bias": (torch.randn(8), Raw()) for i in range(3000)}
    written = write(tmp_path / "x", tensors)
    content = sum(tensor.nbytes for tensor, _ in tensors.values())
    assert written.nbytes < content + 8 * len(tensors)
    header, _ = split_file(written.path.read_bytes())
    assert len(json.dumps(header)) < 1000
    with Reader(written.path) as reader:
        assert [check.error for check in reader.verify()] == [None] * len(tensors)
