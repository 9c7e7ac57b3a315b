"""The page, the schema and the golden files hold: another reader built from the page agrees, and nothing changed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from statecodec import codecs
from statecodec.dtypes import STORED
from statecodec.format import Limits, Reader
from statecodec.format.container import VERSION
from statecodec.kernels.reference.planes import plane_layout
from statecodec.limits import MAX_DIMS, MAX_PACKED_CHUNK, MAX_WINDOW
from tests.format.make_golden import DOCS, EXAMPLE, EXPECTED, FILES, GOLDEN, MARK, expected, hexdump
from tests.format.minimal_reader import MinimalReader
from tests.format.support import bytes_of, manifest, sample, split_file, write

PAGE = DOCS.read_text()
SCHEMA = json.loads(DOCS.with_name("format.schema.json").read_text())
KNOWN: dict[str, Any] = json.loads(EXPECTED.read_text())

# The files that hold a manifest: single ones, and the last shard of several.
LAST_FILES = [p for p in GOLDEN.glob("*.safetensors") if "-of-" not in p.name or re.search(r"-(\d+)-of-\1\.", p.name)]


def methods(reader: Reader, index: int) -> list[int]:
    """The methods of the rows of a packed item's first record."""
    item = reader.items[index]
    header, body = split_file(reader.files[item.shard].read_bytes())
    start = header[item.entry]["data_offsets"][0] + item.start
    rows = sum(plane_layout(spec.dtype)[0] for spec in item.parts.values())
    return [body[start + 5 * k] for k in range(rows)]


@pytest.mark.parametrize("name", FILES)
def test_golden_files_read_as_ever(name: str) -> None:
    known = KNOWN[name]
    for file, digest in known["files"].items():
        assert hashlib.sha256((GOLDEN / file).read_bytes()).hexdigest() == digest, f"{file} was changed"
    assert expected(GOLDEN / known["opened"]) == known


def test_golden_files_are_complete() -> None:
    listed = {file for known in KNOWN.values() for file in known["files"]}
    assert {p.name for p in GOLDEN.iterdir()} == listed | {EXPECTED.name}
    assert KNOWN.keys() == FILES.keys()
    found = set[str]()
    for name in ("packed-2.0", "ulps-2.0", "same-2.0", "following-2.1"):
        with Reader(GOLDEN / f"{name}.safetensors") as reader:
            found |= {item.encoding.codec.name for item in reader.items}
    assert found == set(codecs.names()), "every codec has a golden"  # changes have theirs in tests/analysis
    used, stored = set[int](), set[str]()
    for name in ("packed-2.0", "predicted-2.2"):
        with Reader(GOLDEN / f"{name}.safetensors") as reader:
            packed = [i for i, item in enumerate(reader.items) if item.storage == "packed"]
            used |= {method for i in packed for method in methods(reader, i)}
            stored |= {item.storage for item in reader.items}
    assert used == set(range(8)), "every method has a golden"
    assert stored == {"plain", "packed", "shared"}


@pytest.mark.parametrize("name", FILES)
def test_a_reader_written_from_the_page_agrees(name: str) -> None:
    path = GOLDEN / KNOWN[name]["opened"]
    other = MinimalReader(path)
    with Reader(path) as reader:
        raw = [item.name for item in reader.items if item.encoding.codec.name == "raw"]
        assert raw
        for item in raw:
            assert other.raw_bytes(item) == bytes_of(reader.read(item).parts["data"]), item


@pytest.mark.parametrize("packing", ["none", "zstd", "zstd:5"])
def test_manifests_follow_the_schema(tmp_path: Path, packing: str) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    written = write(tmp_path / "x", sample(), packing=packing, max_shard_size=30_000)
    for path in (written.files[-1], *LAST_FILES):
        validator.validate(manifest(path))
    value = manifest(written.files[-1])
    for change in (
        {"format": "x"}, {"more": 1}, {"items": [{}]}, {"shards": [{"file": "a/b", "header": "0" * 16}]},
        {"items": {**value["items"], "name": [1]}}, {"records": {}}, {"forms": [{}]}, {"plain": "0"},
    ):  # fmt: skip
        assert not validator.is_valid({**value, **change})


def test_the_schema_lists_the_dtypes() -> None:
    assert SCHEMA["$defs"]["dtype"]["enum"] == list(STORED)
    assert SCHEMA["$defs"]["manifest_2"]["properties"]["format_version"]["enum"][-1] == list(VERSION)


def test_the_page_shows_the_example_and_states_the_limits() -> None:
    dump = hexdump((GOLDEN / EXAMPLE).read_bytes())
    assert PAGE.partition(MARK)[2].startswith(dump)
    assert f"version {VERSION[0]}.{VERSION[1]}\n" in PAGE
    for text in (
        f"{MAX_PACKED_CHUNK >> 20} MiB. Larger", f"at most {MAX_WINDOW >> 20} MiB", f"at most {MAX_DIMS} dimensions",
        f"{Limits.max_json_values:,} JSON values", f"depth {Limits.max_json_depth},",
        f"{Limits.max_header_bytes >> 20} MiB each", f"{Limits.max_shards:,} shards",
        f"2^{Limits.max_items.bit_length() - 1} items", f"2^{Limits.max_decoded_bytes.bit_length() - 1} decoded",
    ):  # fmt: skip
        assert text in PAGE, text


def test_hexdump() -> None:
    assert hexdump(b"ab" + bytes(62)) == (
        "000000  61 62 00 00 00 00 00 00 00 00 00 00 00 00 00 00  ab..............\n"
        "000010  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  ................\n*\n000040\n"
    )
