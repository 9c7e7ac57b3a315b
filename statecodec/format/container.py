"""The container: a valid safetensors file, its header checked more strictly than the safetensors library does.

    8 bytes   N, little-endian
    N bytes   JSON header: `__metadata__` and one object per entry, padded with spaces
    ...       the entries' bytes, without holes or overlap, to the end of the file

The header protects itself: `statecodec.header` in its metadata is the XXH3-64 of the N bytes with those 16 digits set
to zeros.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import xxhash

from statecodec.errors import CorruptFile, FormatError, UnsupportedVersion
from statecodec.files import RandomAccess, read_bytes
from statecodec.format.entry_types import ITEMSIZE
from statecodec.limits import Limits
from statecodec.strict import Fields, dump_json, hexadecimal, parse_json

VERSION = (2, 2)  # what is written
READ = {1: 1, 2: 2}  # major version -> the newest minor that this reader knows
MANIFEST_ENTRY = "__manifest__"
METADATA = "__metadata__"
ALIGNMENT = 64  # of the first data byte in the file
UNKNOWN_OFFSET = (1 << 63) - 1  # the widest number an offset can be, for reserving header space

_DIGEST_KEY = b'"statecodec.header":"'
_ZEROS = b"0" * 16


@dataclass(frozen=True)
class TensorEntry:
    """One safetensors entry: bytes start..stop of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A header that was read and checked. `data` is the file offset of the data section."""

    metadata: Mapping[str, str]
    entries: Mapping[str, TensorEntry]
    data: int
    version: tuple[int, int]
    digest: str

    @property
    def newer(self) -> bool:
        """Whether the file is of a newer minor version than this reader."""
        return self.version[1] > READ[self.version[0]]


def build_header(
    entries: Iterable[TensorEntry], metadata: Mapping[str, str], size: int | None = None
) -> tuple[bytes, str]:
    """The header with its length in front, padded to `size` bytes in all (default: as needed), and its digest."""
    body: dict[str, object] = {METADATA: {**metadata, "statecodec.header": _ZEROS.decode()}}
    for e in entries:
        body[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.stop]}
    text = dump_json(body)
    total = size or -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    if total < 8 + len(text):
        raise ValueError(f"header needs {8 + len(text)} bytes, {total} are reserved")
    text = text.ljust(total - 8)
    digest = xxhash.xxh3_64_hexdigest(text)
    at = text.index(_DIGEST_KEY) + len(_DIGEST_KEY)
    return struct.pack("<Q", len(text)) + text[:at] + digest.encode() + text[at + 16 :], digest


def read_header(file: RandomAccess, path: str, limits: Limits) -> Header:
    """Read and check the header of an open file. Raises FormatError and its subclasses, EOFError, OSError."""
    size = file.size
    if size < 8:
        raise FormatError(f"{path}: {size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", read_bytes(file, 0, 8))
    if length > size - 8:
        raise FormatError(f"{path}: the header claims {length:,} of {size:,} bytes: truncated, or not safetensors")
    limits.check(f"{path}: header bytes", length, limits.max_header_bytes)
    text = bytes(read_bytes(file, 8, length))
    if not text.startswith(b"{"):
        raise FormatError(f"{path}: the header does not start with an object: not a safetensors file")
    values = parse_json(text, f"{path}: header", limits)
    metadata = _metadata(values.pop(METADATA, {}), path)
    version = _version(metadata, path)
    digest = _verified_digest(text, metadata, path)
    entries = _entries(values, size - 8 - length, path)
    return Header(metadata, entries, 8 + length, version, digest)


def _metadata(value: object, path: str) -> dict[str, str]:
    fields = Fields(value, f"{path}: {METADATA}")
    return {key: fields.take(key, str) for key in fields.values}


def _version(metadata: Mapping[str, str], path: str) -> tuple[int, int]:
    if metadata.get("format") != "statecodec":
        raise FormatError(f"{path}: a safetensors file, but not of statecodec: its metadata has no format=statecodec")
    text = metadata.get("statecodec.version", "")
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal() and major.isascii() and minor.isascii() and len(text) < 12):
        raise FormatError(f"{path}: statecodec.version is {text[:20]!r}, expected MAJOR.MINOR")
    version = int(major), int(minor)
    if version[0] not in READ:
        readable = " and ".join(f"{major}.x" for major in READ)
        raise UnsupportedVersion(f"{path}: format {text}; this reader knows {readable}: use a newer statecodec")
    return version


def _verified_digest(text: bytes, metadata: Mapping[str, str], path: str) -> str:
    digest = hexadecimal(metadata.get("statecodec.header"), 16, f"{path}: statecodec.header")
    at = text.find(_DIGEST_KEY) + len(_DIGEST_KEY)
    if at < len(_DIGEST_KEY) or text[at : at + 16] != digest.encode() or text.find(_DIGEST_KEY, at) >= 0:
        raise FormatError(f"{path}: statecodec.header must be written once and without white space")
    if xxhash.xxh3_64_hexdigest(text[:at] + _ZEROS + text[at + 16 :]) != digest:
        raise CorruptFile(f"{path}: the header's checksum does not match: the file is damaged")
    return digest


def _entries(values: Mapping[str, object], data_bytes: int, path: str) -> dict[str, TensorEntry]:
    entries = [_entry(name, value, path) for name, value in values.items()]
    end = 0
    for e in sorted(entries, key=lambda e: (e.start, e.stop)):
        if e.start != end:
            where = f"{path}: entry {e.name[:200]!r}"
            raise FormatError(f"{where} starts at {e.start}, expected {end}: a hole or an overlap")
        end = e.stop
    if end != data_bytes:
        raise FormatError(f"{path}: the entries end at {end:,}, the file at {data_bytes:,}: truncated or too long")
    return {e.name: e for e in entries}


def _entry(name: str, value: object, path: str) -> TensorEntry:
    fields = Fields(value, f"{path}: entry {name[:200]!r}")
    dtype, shape = fields.take("dtype", str), fields.shape()
    offsets = fields.take("data_offsets", list)
    fields.done(newer=False)
    if dtype not in ITEMSIZE:
        raise FormatError(f"{fields.where}: unknown dtype {dtype[:20]!r}")
    if len(offsets) != 2 or any(type(o) is not int for o in offsets) or not 0 <= offsets[0] <= offsets[1]:
        raise FormatError(f"{fields.where}: data_offsets {str(offsets)[:80]}")
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEMSIZE[dtype] or start % ITEMSIZE[dtype]:
        raise FormatError(f"{fields.where}: {dtype} {list(shape)} does not fit bytes {start}..{stop}")
    return TensorEntry(name, dtype, shape, start, stop)
