"""A strict reader of the zip archives that torch.save writes: where each stored entry lies, and where its CRC stands.

Structures: PKWARE APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.9 (data descriptor), 4.3.12 (directory),
4.3.14-16 (end records), 4.5.3 (Zip64). Only what torch.save can write is accepted: STORED entries, one disk, no
encryption, no comment; central directory and local headers must tell the same story, and nothing may overlap.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from statecodec.errors import MalformedCheckpoint
from statecodec.files import ByteSource

MAX_DIRECTORY_BYTES: Final = 256 << 20
_END: Final = struct.Struct("<4s4H2IH")
_END64_LOCATOR: Final = struct.Struct("<4sIQI")
_END64: Final = struct.Struct("<4sQ2H2I4Q")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_LOCAL: Final = struct.Struct("<4s5H3I2H")
_NARROW: Final = 0xFFFFFFFF
_ENCRYPTED: Final = 1 | 1 << 6 | 1 << 13
_HAS_DESCRIPTOR: Final = 1 << 3
_IS_UTF8: Final = 1 << 11
_WAY_OUT: Final = (
    "if torch.load reads it, torch.save(torch.load(PATH), NEW_PATH) and use NEW_PATH, or compress the directory that "
    "it is in: there it is carried as bytes"
)


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One stored file of the archive."""

    name: str
    header: int
    """File offset of the local header."""
    offset: int
    """File offset of the first data byte."""
    nbytes: int
    crc: int
    """0: not computed (torch.save with compute_crc32 off)."""
    crc_at: tuple[int, ...]
    """File offsets of every copy of the CRC."""
    end: int
    """File offset behind the data and its descriptor."""


@dataclass(frozen=True, slots=True)
class _Central:
    name: bytes
    flags: int
    header: int
    nbytes: int
    crc: int
    at: int


def read_entries(source: ByteSource) -> tuple[ZipEntry, ...]:
    """Every entry, in file order, fully checked. Reads headers only, never payload. Raises MalformedCheckpoint."""
    start, size, count = _directory_bounds(source)
    directory = source.read(start, size)
    central, pos = [], 0
    while pos < size:
        record, pos = _central(directory, pos, start)
        central.append(record)
    if len(central) != count:
        raise MalformedCheckpoint(f"zip directory: {count} entries announced, {len(central)} found")
    entries = [_entry(source, record, start) for record in sorted(central, key=lambda c: c.header)]
    seen: set[str] = set()
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        if entry.name in seen:
            raise MalformedCheckpoint(f"zip entry {entry.name!r} is there twice")
        seen.add(entry.name)
        if entry.end > (start if following is None else following.header):
            raise MalformedCheckpoint(f"zip entry {entry.name!r} overlaps what follows it")
    if entries and entries[0].header != 0:
        raise MalformedCheckpoint(f"{entries[0].header} unknown bytes before the first zip entry")
    return tuple(entries)


def read_checked(source: ByteSource, entry: ZipEntry, limit: int) -> bytes:
    """The entry's bytes, held against its CRC. Raises MalformedCheckpoint."""
    if entry.nbytes > limit:
        raise MalformedCheckpoint(f"zip entry {entry.name!r} has {entry.nbytes} bytes; more than {limit} are not read")
    data = source.read(entry.offset, entry.nbytes)
    if entry.crc and zlib.crc32(data) != entry.crc:
        raise MalformedCheckpoint(f"zip entry {entry.name!r} does not match its CRC-32; the file is damaged")
    return data


def _directory_bounds(source: ByteSource) -> tuple[int, int, int]:
    """(file offset, bytes, entries) of the central directory."""
    if source.size < _END.size:
        raise MalformedCheckpoint("too short to be a zip archive")
    end_at = source.size - _END.size
    sig, disk, disk2, here, count, size, start, comment = _END.unpack(source.read(end_at, _END.size))
    if sig != b"PK\x05\x06" or comment:
        tail = source.read(max(0, source.size - (1 << 16)), min(source.size, 1 << 16))
        if b"PK\x05\x06" in tail:
            raise MalformedCheckpoint(
                "unknown bytes after the end of the zip archive (a comment, or something appended), as torch.save "
                f"never writes; {_WAY_OUT}"
            )
        raise MalformedCheckpoint("zip archive without its directory: the file is truncated")
    behind = end_at
    if end_at >= _END64_LOCATOR.size:
        locator_at = end_at - _END64_LOCATOR.size
        sig, disk64, end64_at, disks = _END64_LOCATOR.unpack(source.read(locator_at, _END64_LOCATOR.size))
        if sig == b"PK\x06\x07":
            if disk64 or disks != 1 or end64_at + _END64.size != locator_at:
                raise MalformedCheckpoint("zip64 locator does not point at its end record: bytes were added or lost")
            record = _END64.unpack(source.read(end64_at, _END64.size))
            sig, length, _, _, wide_disk, wide_disk2, wide_here, wide_count, wide_size, wide_start = record
            if sig != b"PK\x06\x06" or length != _END64.size - 12 or wide_disk or wide_disk2:
                raise MalformedCheckpoint("zip64 end record is damaged")
            tops = (0xFFFF, 0xFFFF, _NARROW, _NARROW)
            wides = (wide_here, wide_count, wide_size, wide_start)
            for narrow, wide, top in zip((here, count, size, start), wides, tops, strict=True):
                if narrow not in (wide, top):
                    raise MalformedCheckpoint("zip end records disagree")
            here, count, size, start, behind = wide_here, wide_count, wide_size, wide_start, end64_at
    if disk or disk2 or here != count:
        raise MalformedCheckpoint("zip archive of several disks")
    if start + size != behind:
        raise MalformedCheckpoint(
            f"zip directory should end at byte {start + size} but ends at {behind}: bytes were added in front or lost"
        )
    if size > MAX_DIRECTORY_BYTES or count * _CENTRAL.size > size:
        raise MalformedCheckpoint(f"zip directory of {size} bytes for {count} entries")
    return start, size, count


def _central(directory: bytes, pos: int, start: int) -> tuple[_Central, int]:
    if len(directory) - pos < _CENTRAL.size:
        raise MalformedCheckpoint("zip directory ends inside an entry")
    fields = _CENTRAL.unpack_from(directory, pos)
    sig, _, _, flags, method, _, _, crc, packed, nbytes, n_name, n_extra, n_comment, disk, _, _, header = fields
    end = pos + _CENTRAL.size + n_name + n_extra + n_comment
    if sig != b"PK\x01\x02" or end > len(directory):
        raise MalformedCheckpoint("zip directory is damaged")
    name_at = pos + _CENTRAL.size
    name, extra = directory[name_at : name_at + n_name], directory[name_at + n_name : end - n_comment]
    if flags & _ENCRYPTED:
        raise MalformedCheckpoint(f"zip entry {name!r} is encrypted")
    if method != 0:
        raise MalformedCheckpoint(
            f"zip entry {name!r} is compressed (method {method}), as torch.save never does; {_WAY_OUT}"
        )
    wide = iter(_zip64(extra))
    try:
        nbytes = next(wide) if nbytes == _NARROW else nbytes
        packed = next(wide) if packed == _NARROW else packed
        header = next(wide) if header == _NARROW else header
    except StopIteration:
        raise MalformedCheckpoint(f"zip entry {name!r} lacks its zip64 sizes") from None
    if packed != nbytes or disk not in (0, 0xFFFF):
        raise MalformedCheckpoint(f"zip entry {name!r}: {packed} stored bytes for {nbytes}")
    return _Central(name, flags, header, nbytes, crc, start + pos), end


def _zip64(extra: bytes) -> list[int]:
    """The values of the Zip64 extra field; empty if there is none."""
    pos = 0
    while pos + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, pos)
        if kind == 1:
            body = extra[pos + 4 : pos + 4 + size]
            return list(struct.unpack_from(f"<{len(body) // 8}Q", body))
        pos += 4 + size
    return []


def _entry(source: ByteSource, central: _Central, directory: int) -> ZipEntry:
    """The entry behind a directory record, checked against its local header and descriptor."""
    name = _name(central)
    if central.header + _LOCAL.size > directory:
        raise MalformedCheckpoint(f"zip entry {name!r} is said to lie at byte {central.header}, outside of the archive")
    fixed = _LOCAL.unpack(source.read(central.header, _LOCAL.size))
    sig, _, flags, method, _, _, crc, packed, nbytes, n_name, n_extra = fixed
    variable = source.read(central.header + _LOCAL.size, n_name + n_extra)
    if sig != b"PK\x03\x04" or method != 0 or flags != central.flags or variable[:n_name] != central.name:
        raise MalformedCheckpoint(f"zip entry {name!r}: local header and directory disagree")
    wide = _zip64(variable[n_name:])
    streamed = bool(flags & _HAS_DESCRIPTOR)
    for found in (nbytes, packed):
        said = wide[0] if found == _NARROW and wide else found
        if said != central.nbytes and not (streamed and found in (0, _NARROW)):
            raise MalformedCheckpoint(f"zip entry {name!r}: local header says {said} bytes, directory {central.nbytes}")
    if crc != central.crc and not (streamed and crc == 0):
        raise MalformedCheckpoint(f"zip entry {name!r}: local header and directory give different CRCs")
    offset = central.header + _LOCAL.size + n_name + n_extra
    end = offset + central.nbytes
    if end > directory:
        raise MalformedCheckpoint(f"zip entry {name!r} is said to end at byte {end}, in the zip directory")
    at = [central.at + 16] + ([central.header + 14] if crc else [])
    if streamed:
        # The wide form belongs to a Zip64 local header, but writers differ; the sizes tell which one it is.
        descriptor = source.read(end, min(24, source.size - end))
        sizes = (central.nbytes, central.nbytes)
        narrow = struct.pack("<4s3I", b"PK\x07\x08", central.crc, *sizes) if central.nbytes <= _NARROW else None
        wide_form = struct.pack("<4sI2Q", b"PK\x07\x08", central.crc, *sizes)
        if descriptor == wide_form:
            length = len(wide_form)
        elif narrow is not None and descriptor.startswith(narrow):
            length = len(narrow)
        else:
            raise MalformedCheckpoint(f"zip entry {name!r}: data descriptor and directory disagree")
        at.append(end + 4)
        end += length
    return ZipEntry(name, central.header, offset, central.nbytes, central.crc, tuple(sorted(at)), end)


def _name(central: _Central) -> str:
    try:
        name = central.name.decode("utf-8" if central.flags & _IS_UTF8 else "cp437")
    except UnicodeDecodeError:
        raise MalformedCheckpoint(f"zip entry name {central.name!r} is not UTF-8") from None
    if not name or "\0" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
        raise MalformedCheckpoint(f"zip entry name {name!r} points outside of the archive")
    return name
