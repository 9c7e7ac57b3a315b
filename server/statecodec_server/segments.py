"""A downloadable thing put together from literal bytes and ranges of stored objects, without copying them.

A result of one file is one segment. A result of several files is a tar whose headers are literal bytes. A single
tensor is a small safetensors file whose header is literal and whose payload is a range of the result.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .storage import BLOCK, Storage

_TAR_BLOCK = 512
_TAR_END = 2 * _TAR_BLOCK


@dataclass(frozen=True)
class Segment:
    """`length` bytes: either literal, or from `start` on in the object under `key`."""

    length: int
    literal: bytes | None = None
    key: str = ""
    start: int = 0


def literal(data: bytes) -> Segment:
    """A segment of bytes we made ourselves."""
    return Segment(len(data), data)


def total(segments: Sequence[Segment]) -> int:
    """The length of the whole."""
    return sum(segment.length for segment in segments)


async def stream(storage: Storage, segments: Sequence[Segment], start: int, length: int) -> AsyncIterator[bytes]:
    """Bytes `start` to `start + length` of the whole, block by block."""
    for segment in segments:
        if length == 0:
            return
        if start >= segment.length:
            start -= segment.length
            continue
        size = min(length, segment.length - start)
        if segment.literal is not None:
            yield segment.literal[start : start + size]
        else:
            async for block in storage.stream(segment.key, segment.start + start, size):
                yield block
        start, length = 0, length - size


def _header(name: str, nbytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = nbytes, 0o644, 0
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(nbytes: int) -> bytes:
    return b"\0" * (-nbytes % _TAR_BLOCK)


def tar_segments(files: Sequence[tuple[str, int, str]]) -> list[Segment]:
    """A tar of (name, bytes, key), the same bytes every time."""
    segments = []
    for name, nbytes, key in files:
        segments += [literal(_header(name, nbytes)), Segment(nbytes, key=key), literal(_padding(nbytes))]
    return [segment for segment in (*segments, literal(b"\0" * _TAR_END)) if segment.length]


def tar_sha256(folder: Path, files: Sequence[tuple[str, int]]) -> tuple[str, list[str]]:
    """SHA-256 of the tar that `tar_segments` describes, and of each of its files, in one reading."""
    whole, each = hashlib.sha256(), []
    for name, nbytes in files:
        whole.update(_header(name, nbytes))
        of_file = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(BLOCK):
                of_file.update(block)
                whole.update(block)
        whole.update(_padding(nbytes))
        each.append(of_file.hexdigest())
    whole.update(b"\0" * _TAR_END)
    return whole.hexdigest(), each


def safetensors_header(storage: Storage, key: str, nbytes: int, limit: int = 100 << 20) -> tuple[dict[str, Any], int]:
    """The JSON header of a stored safetensors file of `nbytes`, and the offset at which its payload begins.

    Raises ValueError for any other file, and for a header of more than `limit` bytes.
    """
    size = int.from_bytes(storage.read(key, 0, 8), "little")
    if nbytes < 8 or size > min(limit, nbytes - 8):
        raise ValueError("not a safetensors file")
    header = json.load(io.BytesIO(storage.read(key, 8, size)))
    if not isinstance(header, dict):
        raise ValueError("not a safetensors header")
    return header, 8 + size


def tensor_segments(
    header: Mapping[str, Any], payload: int, key: str, name: str, about: Mapping[str, str]
) -> list[Segment] | None:
    """A safetensors file with the stored parts of one tensor (`name` or `name/...`); None when there are none."""
    entries = [
        (entry, value)
        for entry, value in header.items()
        if entry != "__metadata__" and (entry == name or entry.startswith(name + "/"))
    ]
    if not entries:
        return None
    entries.sort(key=lambda item: item[1]["data_offsets"][0])
    described: dict[str, Any] = {"__metadata__": dict(about)}
    payloads, end = [], 0
    for entry, value in entries:
        first, last = value["data_offsets"]
        described[entry] = {**value, "data_offsets": [end, end + last - first]}
        payloads.append(Segment(last - first, key=key, start=payload + first))
        end += last - first
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 8)
    return [literal(len(text).to_bytes(8, "little") + text), *(part for part in payloads if part.length)]
