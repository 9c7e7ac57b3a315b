"""CRC-32s of zip records, put together from pieces: whatever is read, in whatever order, damage is found."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import statecodec
from statecodec.checkpoint.span_crcs import SpanCrcs
from statecodec.errors import MalformedCheckpoint
from statecodec.layouts import Crc32

DATA = bytes(range(256)) * 4
SPANS = [Crc32(10, 300, (0,)), Crc32(310, 1, ()), Crc32(400, 0, ()), Crc32(400, 600, (4,))]


@given(pieces=st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(0, 400)), max_size=30))
def test_pieces_in_any_order_overlapping_or_missing(pieces: list[tuple[int, int]]) -> None:
    found = dict[int, int]()
    read = list[int]()

    def fill(offset: int, target: memoryview) -> None:
        read.append(len(target))
        target[:] = DATA[offset : offset + len(target)]

    def done(span: Crc32, crc: int) -> None:
        assert span.offset not in found
        found[span.offset] = crc

    crcs = SpanCrcs(reversed(SPANS), fill, done)
    for start, length in pieces:
        content = DATA[start : start + length]
        crcs.add(start, len(content), zlib.crc32(content))
    crcs.finish()
    crcs.finish()
    assert found == {s.offset: zlib.crc32(DATA[s.offset : s.offset + s.nbytes]) for s in SPANS if s.nbytes}
    assert sum(read) <= 901


def test_what_is_there_is_not_read() -> None:
    found = list[int]()
    crcs = SpanCrcs(SPANS[:1], lambda offset, target: pytest.fail("read"), lambda span, crc: found.append(crc))
    for start, stop in ((200, 310), (10, 150), (200, 310), (150, 200)):
        assert not found
        crcs.add(start, stop - start, zlib.crc32(DATA[start:stop]))
    assert found == [zlib.crc32(DATA[10:310])]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensor of several chunks, one that its codec refuses, a small one, and two views of one storage."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("crcs") / "ckpt.pt"
    refused, shared = torch.randn(70_000), torch.randn(90, 50)
    refused[-1] = torch.nan
    several = torch.randn(1_100_000)
    torch.save({"a": several, "b": refused, "c": torch.arange(9), "d": shared[:50], "e": shared[40:].T}, path)
    return path


@pytest.mark.parametrize("shares", [0, 3])
@pytest.mark.parametrize("options", [{}, {"sha256": True, "threads": 2}])
def test_a_flipped_bit_of_any_record_is_found_once(
    shares: int, options: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    damaged, target = tmp_path / "ckpt.pt", tmp_path / "c.sc.safetensors"
    chosen = {"rules": ["*:fp32=uniform(step=0.001)"], "force": True, **options}
    with zipfile.ZipFile(source) as archive:
        records = [(r.filename, archive.open(r)) for r in archive.infolist() if "/data/" in r.filename]
        ends = [content._orig_compress_start + len(content.read()) for _, content in records]  # type: ignore[attr-defined]
    assert len(records) == 4
    parts = [{"share": f"{number}/{shares}"} for number in range(1, shares + 1)] or [{}]
    for (name, _), end in zip(records, ends, strict=True):
        content = bytearray(source.read_bytes())
        content[end - 1] ^= 1
        damaged.write_bytes(content)
        found = [complaint(damaged, target, **chosen, **share) for share in parts]
        assert [text for text in found if text] == [text for text in found if "CRC-32" in text][:1] != [], name
    assert not target.exists()


def complaint(*args: Any, **options: Any) -> str:
    """What `compress`, or `compress_share` if a share is named, says of the file."""
    try:
        (statecodec.compress_share if "share" in options else statecodec.compress)(*args, **options)
    except MalformedCheckpoint as error:
        return str(error)
    return ""
