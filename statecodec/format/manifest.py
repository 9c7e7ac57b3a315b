"""The manifest: what a file holds, as frozen dataclasses and as JSON at the file's end, compressed if that is smaller.

It is untrusted. Unknown fields are refused, except in files of a newer minor version, which by definition only adds
what older readers may ignore.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard

from statecodec.errors import FormatError
from statecodec.format import columns, rows
from statecodec.format.frames import MAGIC, decompress, frame_size
from statecodec.format.items import StoredItem
from statecodec.limits import Limits
from statecodec.strict import Fields, dump_json, parse_json


@dataclass(frozen=True)
class OtherShard:
    """A shard before the last, which holds the manifest: its file name, and its header's digest."""

    file: str
    header: str


@dataclass(frozen=True)
class Manifest:
    """Everything a file says about itself."""

    version: tuple[int, int]
    writer: str
    shards: tuple[OtherShard, ...]
    items: tuple[StoredItem, ...]
    document: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The manifest as it is written to a file.

        Raises ValueError or TypeError for values that JSON does not have.
        """
        value = {
            "format": "statecodec",
            "format_version": list(self.version),
            "writer": self.writer,
            "shards": [{"file": s.file, "header": s.header} for s in self.shards],
            **columns.write_items(self.items, len(self.shards) + 1),
            "document": dict(self.document),
        }
        text = dump_json(value)
        frame = zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress(text)
        return frame if len(frame) < len(text) else text

    @classmethod
    def parse(cls, data: bytes, version: tuple[int, int], newer: bool, limits: Limits) -> Manifest:
        """A manifest from untrusted bytes; `version` is what the header said. Raises FormatError and its subclasses."""
        if version[0] == 1:
            text, most = data, limits
        else:
            text, most = manifest_text(data, limits), limits.for_manifest(len(data))
        top = Fields(parse_json(text, "manifest", most), "manifest")
        del text
        if top.take("format", str) != "statecodec" or top.take("format_version", list) != list(version):
            raise FormatError("manifest: its format and format_version are not those of the header")
        writer = top.take("writer", str)
        shards = tuple(_shard(value, newer) for value in top.take("shards", list))
        limits.check("manifest: shards", len(shards) + 1, limits.max_shards)
        if version[0] == 1:
            items = rows.read_items(top.take("items", list), len(shards), newer, limits)
        else:
            items = columns.read_items(top, len(shards) + 1, newer, limits)
        document = top.take("document", dict)
        top.done(newer)
        _check_companions(items)
        limits.check("decoded bytes", sum(item.decoded_nbytes for item in items), limits.max_decoded_bytes)
        return cls(version, writer, shards, items, document)


def _check_companions(items: Sequence[StoredItem]) -> None:
    """Refuse names that are not unique, and items whose companions are missing, of another shape, or need companions.

    The item that another one repeats may need companions, but may not itself be such a repetition.
    """
    named = {item.name: item for item in items}
    if len(named) != len(items):
        raise FormatError("manifest: two items have the same name")
    for item in items:
        for role, name in item.companions.items():
            other = named.get(name)
            if other is None or other.shape != item.shape or not _may_serve(other, item):
                raise FormatError(
                    f"manifest: item {item.name[:200]!r}: its {role} {name[:200]!r} is no item that it can follow from"
                )


def _may_serve(other: StoredItem, item: StoredItem) -> bool:
    codec = other.encoding.codec
    if item.encoding.codec.repeats:
        return other.dtype == item.dtype and not codec.repeats
    return other.dtype.is_floating_point and not codec.needs


# Names and numbers of columns repeat: a level that looks for matches, in the window that readers accept.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(9, window_log=23)


def manifest_text(data: bytes, limits: Limits) -> bytes:
    """The JSON text of a manifest that may be one zstd frame. Raises LimitExceeded before it takes memory."""
    if not data.startswith(MAGIC):
        return data
    frame = np.frombuffer(data, np.uint8)
    size = frame_size(frame)
    limits.check("manifest: bytes of its text", size, limits.manifest_text(len(data)))
    text = np.empty(size, np.uint8)
    decompress(frame, text)
    return text.tobytes()


def is_file_name(name: str) -> bool:
    """Whether an untrusted name is a file name: no path, nothing that leaves the directory."""
    return 0 < len(name) < 256 and name not in (".", "..") and not any(c in "/\\" or ord(c) < 32 for c in name)


def _shard(value: object, newer: bool) -> OtherShard:
    fields = Fields(value, "manifest: shard")
    name = fields.take("file", str)
    if not is_file_name(name):
        raise FormatError(f"manifest: {name[:80]!r} is not a file name")
    shard = OtherShard(name, fields.hexadecimal("header", 16))
    fields.done(newer)
    return shard
