"""The strict zip reader: agreement with zipfile on good archives, and a named refusal for each way to lie."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec.errors import MalformedCheckpoint
from statecodec.files import MemoryBytes
from statecodec.layouts import locate
from statecodec.layouts.zip_reader import read_entries
from tests.layouts.support import found_file, pickle_of


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.randn(30), "b": torch.arange(5)}, buffer)
    return buffer.getvalue()


def entry(name: bytes, nbytes: int, crc: int, *, wide: bool = False) -> tuple[bytes, bytes]:
    """(local header, descriptor) as torch writes them: sizes and CRC behind the data; `wide` as from 4 GiB on."""
    extra = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if wide else b""
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 0, 0x808, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra
    return local, struct.pack("<4sI2Q" if wide else "<4s3I", b"PK\x07\x08", crc, nbytes, nbytes)


def directory(records: list[tuple[bytes, int, int, int]], start: int) -> bytes:
    """Central directory and end records of (name, header offset, nbytes, crc)."""
    body = b""
    for name, header, nbytes, crc in records:
        values = [v for v in (nbytes, nbytes, header) if v >= 0xFFFFFFFF]
        extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        narrow = [min(v, 0xFFFFFFFF) for v in (nbytes, nbytes, header)]
        body += struct.pack(
            "<4s6H3I5H2I",
            b"PK\x01\x02",
            0,
            0,
            0x808,
            0,
            0,
            0,
            crc,
            *narrow[:2],
            len(name),
            len(extra),
            0,
            0,
            0,
            0,
            narrow[2],
        )
        body += name + extra
    n = len(records)
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, n, n, len(body), start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(body), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, n, n, min(len(body), 0xFFFFFFFF), min(start, 0xFFFFFFFF), 0)
    return body + end64 + locator + end


def test_entries_agree_with_zipfile() -> None:
    data = torch_file()
    entries = read_entries(MemoryBytes(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {e.name: (e.header, e.nbytes, e.crc) for e in entries} == {
            i.filename: (i.header_offset, i.file_size, i.CRC) for i in archive.infolist()
        }
        for e in entries:
            assert data[e.offset : e.offset + e.nbytes] == archive.read(e.name)


def test_a_100_gb_archive_is_located_from_its_headers(tmp_path: Path) -> None:
    """Zip64 sizes and offsets as torch's writer lays them down, around storages that are holes of a sparse file."""
    half = 50 << 30
    pickle = pickle_of({"model": {"a": torch.zeros(2, 1024), "b": torch.zeros(2, 1024)}})
    rows = half // 4096
    # The pickle of two small tensors, with the sizes of large ones written in: 4-byte integers become 8-byte ones.
    pickle = pickle.replace(b"M\x00\x08tq", b"\x8a\x08" + (half // 4).to_bytes(8, "little") + b"tq")
    pickle = pickle.replace(b"K\x02M\x00\x04\x86", b"\x8a\x05" + rows.to_bytes(5, "little") + b"M\x00\x04\x86")
    path, records = tmp_path / "huge.pt", []
    with path.open("wb") as out:
        for name, nbytes, data in (
            (b"x/data.pkl", len(pickle), pickle),
            (b"x/data/0", half, b""),
            (b"x/data/1", half, b""),
        ):
            header, crc = out.tell(), zlib.crc32(data)
            local, descriptor = entry(name, nbytes, crc, wide=nbytes >= 1 << 32)
            out.write(local + data)
            out.seek(nbytes - len(data), 1)
            out.write(descriptor)
            records.append((name, header, nbytes, crc))
        out.write(directory(records, out.tell()))
    file = found_file(path)
    assert [(r.name, r.nbytes, r.shape, r.role) for r in file.regions] == [
        ("model.a", half, (rows, 1024), "weight"),
        ("model.b", half, (rows, 1024), "weight"),
    ]


def patched(data: bytes, marker: bytes, offset: int, new: bytes) -> bytes:
    at = data.index(marker) + offset
    return data[:at] + new + data[at + len(new) :]


GOOD = torch_file()
CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


def deflated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02N.")
        archive.writestr("x/data/0", bytes(1 << 20))
    return buffer.getvalue()


def twice() -> bytes:
    data = bytearray()
    records = []
    for payload in (b"one", b"two"):
        local, descriptor = entry(b"x/data.pkl", 3, zlib.crc32(payload))
        records.append((b"x/data.pkl", len(data), 3, zlib.crc32(payload)))
        data += local + payload + descriptor
    return bytes(data) + directory(records, len(data))


def overlapping() -> bytes:
    """One payload that two directory records claim: the seed of a zip bomb."""
    local, descriptor = entry(b"x/a", 3, zlib.crc32(b"one"))
    data = local + b"one" + descriptor
    record = (b"x/a", 0, 3, zlib.crc32(b"one"))
    return data + directory([record, record], len(data))


HOSTILE = {
    "compressed": (deflated(), "compressed"),
    "twice": (twice(), "twice"),
    "overlap": (overlapping(), "twice|overlaps"),
    "encrypted": (patched(GOOD, CENTRAL, 8, b"\x09"), "encrypted"),
    "names disagree": (patched(GOOD, LOCAL, 30, b"X"), "disagree"),
    "flags disagree": (patched(GOOD, LOCAL, 6, b"\0"), "disagree"),
    "methods disagree": (patched(GOOD, LOCAL, 8, b"\x08"), "disagree"),
    "size in the local header": (patched(GOOD, LOCAL, 22, b"\x07\0\0\0"), "local header says"),
    "crc in the local header": (patched(GOOD, LOCAL, 14, b"\x07\0\0\0"), "CRC"),
    "crc in the descriptor": (patched(GOOD, b"PK\x07\x08", 4, b"\x07\0\0\0"), "descriptor"),
    "sizes in the directory": (patched(GOOD, CENTRAL, 20, b"\xff\xff\xff\x7f" * 2), "end at byte"),
    "stored and real size": (patched(GOOD, CENTRAL, 20, b"\x01\0\0\0"), "stored bytes"),
    "zip64 size without its field": (patched(GOOD, CENTRAL, 24, b"\xff\xff\xff\xff"), "zip64"),
    "offset outside": (patched(GOOD, CENTRAL, 42, b"\xff\xff\xff\x7f"), "outside"),
    "trailing garbage": (GOOD + b"garbage", "after the end"),
    "leading garbage": (b"garbage" + GOOD, "front|zip64|before"),
    "two archives": (GOOD + GOOD, "front|zip64"),
    "comment": (GOOD[:-2] + b"\x04\0" + b"abcd", "after the end"),
    "fewer entries than announced": (
        patched(patched(GOOD, b"PK\x06\x06", 24, b"\x02"), b"PK\x06\x06", 32, b"\x02"),
        "disagree",
    ),
    "traversal": (GOOD.replace(b"archive/version", b"archive/../sion"), r"outside"),
    "null in a name": (GOOD.replace(b"archive/version", b"archive/\0ersion"), r"outside"),
    "not a zip": (b"PK\x03\x04", "too short"),
}


@pytest.mark.parametrize(("data", "match"), HOSTILE.values(), ids=HOSTILE.keys())
def test_lies_are_refused_by_name(data: bytes, match: str) -> None:
    with pytest.raises(MalformedCheckpoint, match=match):
        read_entries(MemoryBytes(data))


def test_a_damaged_skeleton_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    data = bytearray(GOOD)
    at = data.index(b"little")
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(MalformedCheckpoint, match="CRC-32"):
        locate(path)


def rewritten(path: Path, to: Path, *, deflated: str = "", comment: bytes = b"") -> None:
    """A torch file as another zip tool writes it: torch.load reads it all the same."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, "w") as target:
        for entry in source.infolist():
            method = zipfile.ZIP_DEFLATED if deflated and entry.filename.endswith(deflated) else zipfile.ZIP_STORED
            target.writestr(entry.filename, source.read(entry), compress_type=method)
        target.comment = comment


@pytest.mark.parametrize("how", [{"deflated": "data/0"}, {"deflated": "version"}, {"comment": b"by hand"}], ids=str)
def test_what_other_zip_tools_write(tmp_path: Path, how: dict[str, Any]) -> None:
    """A single file is refused with what helps; in a directory it is carried as bytes."""
    torch.save({"x": torch.ones(500)}, tmp_path / "plain.pt")
    folder, packed, back = tmp_path / "run", tmp_path / "run.sc.safetensors", tmp_path / "back"
    folder.mkdir()
    rewritten(tmp_path / "plain.pt", folder / "odd.pt", **how)
    assert torch.load(folder / "odd.pt")["x"].sum() == 500
    with pytest.raises(MalformedCheckpoint, match=r"torch\.save\(torch\.load.*or compress the directory"):
        locate(folder / "odd.pt")
    report = statecodec.compress(folder, packed, verify=True)
    assert any("odd.pt" in note for note in report.notes)
    statecodec.restore(packed, back)
    assert (back / "odd.pt").read_bytes() == (folder / "odd.pt").read_bytes()
