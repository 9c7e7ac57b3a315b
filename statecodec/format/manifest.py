"""The manifest: what a file holds, as frozen dataclasses and as the JSON at the file's end.

The JSON is untrusted. Unknown fields are refused, except in files of a newer minor version, which by definition only
adds what older readers may ignore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from statecodec.codecs import Codec, PartSpec, from_config
from statecodec.codecs.chunking import Chunk
from statecodec.dtypes import STORED
from statecodec.errors import CodecError, FormatError, LimitExceeded, UnknownCodec, UnsupportedVersion
from statecodec.format.entry_types import dtype_name, entry_type
from statecodec.limits import MAX_PACKED_CHUNK, Limits
from statecodec.strict import Fields, hexadecimal, parse_json

PLAIN, PACKED = "plain", "packed"


@dataclass(frozen=True)
class StoredChunk(Chunk):
    """A chunk in a file. `nbytes`: of its record (packed) or its parts (plain). `checksums`: one, or one per part."""

    nbytes: int
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class StoredItem:
    """One encoded tensor in a file; `parts` are the whole tensor's."""

    name: str
    codec: Codec
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: str
    parts: Mapping[str, PartSpec]
    chunks: tuple[StoredChunk, ...]
    attributes: Mapping[str, Any]
    shard: int
    entry: str
    companions: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the parts before packing."""
        return sum(spec.nbytes for spec in self.parts.values())

    @property
    def stored_nbytes(self) -> int:
        """Bytes in the file."""
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def decoded_nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The safetensors entries of this item: name -> (dtype, shape)."""
        if self.storage == PACKED:
            return {self.entry: ("U8", (self.stored_nbytes,))}
        return {f"{self.entry}/{part}": entry_type(spec) for part, spec in self.parts.items()}

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"name": self.name}
        if self.entry != self.name:
            value["entry"] = self.entry
        if self.companions:
            value["companions"] = dict(self.companions)
        parts = {k: {"dtype": dtype_name(s.dtype), "shape": list(s.shape)} for k, s in self.parts.items()}
        return {
            **value, "shard": self.shard, "codec": self.codec.config(), "dtype": dtype_name(self.dtype),
            "shape": list(self.shape), "storage": self.storage, "parts": parts,
            "chunks": [_chunk_json(c, self.storage) for c in self.chunks], "attributes": dict(self.attributes),
        }  # fmt: skip


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

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "statecodec",
            "format_version": list(self.version),
            "writer": self.writer,
            "shards": [{"file": s.file, "header": s.header} for s in self.shards],
            "items": [item.to_json() for item in self.items],
            "document": dict(self.document),
        }

    @classmethod
    def parse(cls, data: bytes, version: tuple[int, int], newer: bool, limits: Limits) -> Manifest:
        """A manifest from untrusted bytes; `version` is what the header said. Raises FormatError and its subclasses."""
        top = Fields(parse_json(data, "manifest", limits), "manifest")
        if top.take("format", str) != "statecodec" or top.take("format_version", list) != list(version):
            raise FormatError("manifest: its format and format_version are not those of the header")
        writer = top.take("writer", str)
        shards = tuple(_shard(value, newer) for value in top.take("shards", list))
        limits.check("manifest: shards", len(shards) + 1, limits.max_shards)
        values = top.take("items", list)
        limits.check("manifest: items", len(values), limits.max_items)
        items = tuple(_item(value, i, len(shards), newer, limits) for i, value in enumerate(values))
        document = top.take("document", dict)
        top.done(newer)
        _check_companions(items)
        limits.check("decoded bytes", sum(item.decoded_nbytes for item in items), limits.max_decoded_bytes)
        return cls(version, writer, shards, items, document)


def _check_companions(items: Sequence[StoredItem]) -> None:
    """Names are unique, and every item that needs others has them: of its shape, and not in need themselves."""
    named = {item.name: item for item in items}
    if len(named) != len(items):
        raise FormatError("manifest: two items have the same name")
    for item in items:
        for role, name in item.companions.items():
            other = named.get(name)
            if other is None or other.shape != item.shape or other.codec.needs or not other.dtype.is_floating_point:
                raise FormatError(
                    f"manifest: item {item.name[:200]!r}: its {role} {name[:200]!r} is no float item of its shape"
                )


def _chunk_json(chunk: StoredChunk, storage: str) -> dict[str, Any]:
    if storage == PACKED:
        return {"shape": list(chunk.shape), "nbytes": chunk.nbytes, "checksum": chunk.checksums[0]}
    return {"shape": list(chunk.shape), "checksums": list(chunk.checksums)}


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


def _item(value: object, index: int, last_shard: int, newer: bool, limits: Limits) -> StoredItem:
    fields = Fields(value, f"manifest: item {index}")
    name = fields.take("name", str)
    fields.where = f"manifest: item {name[:200]!r}"
    dtype, shape = _dtype(fields), fields.shape()
    # Zero-size dimensions count as one here: a shape of (0, 2**60) is no less a lie.
    footprint = math.prod(max(d, 1) for d in shape) * dtype.itemsize
    limits.check(f"{fields.where}: decoded bytes", footprint, limits.max_decoded_bytes)
    codec = _codec(fields).settled(shape)
    storage = fields.take("storage", str)
    if storage not in (PLAIN, PACKED):
        raise UnsupportedVersion(f"{fields.where}: storage {storage[:40]!r}; this reader knows plain and packed")
    specs = _specs(codec, fields.where)
    parts = _parts(fields, newer)
    if parts != specs(shape, dtype) or list(parts) != list(specs(shape, dtype)):
        raise FormatError(f"{fields.where}: its parts are not those of {codec} for {dtype} {shape}")
    whole = codec.align(shape) is None
    cut = _Cut(shape, dtype, parts, specs, storage, fields.where, newer, limits, whole)
    chunks = cut.chunks(fields.take("chunks", list))
    attributes = fields.take("attributes", dict)
    shard, entry = fields.integer("shard", last_shard), fields.take("entry", str, name)
    companions = _companions(fields, codec)
    fields.done(newer)
    return StoredItem(name, codec, shape, dtype, storage, parts, chunks, attributes, shard, entry, companions)


def _dtype(fields: Fields) -> torch.dtype:
    name = fields.take("dtype", str)
    if name not in STORED:
        raise UnsupportedVersion(f"{fields.where}: unknown dtype {name[:40]!r}")
    return STORED[name]


def _codec(fields: Fields) -> Codec:
    config = fields.take("codec", dict)
    try:
        return from_config(config)
    except UnknownCodec as error:
        raise UnsupportedVersion(f"{fields.where}: {error}; a newer statecodec may have it") from error
    except CodecError as error:
        raise FormatError(f"{fields.where}: {error}") from error


def _companions(fields: Fields, codec: Codec) -> Mapping[str, str]:
    if not codec.needs:
        return {}
    companions: dict[str, str] = fields.take("companions", dict)
    if set(companions) != set(codec.needs) or not all(isinstance(name, str) for name in companions.values()):
        raise FormatError(f"{fields.where}: {codec.name} needs companions {', '.join(codec.needs)}")
    return companions


def _parts(fields: Fields, newer: bool) -> dict[str, PartSpec]:
    parts = {}
    for name, value in fields.take("parts", dict).items():
        part = Fields(value, f"{fields.where}: part {name[:80]!r}")
        parts[name] = PartSpec(_dtype(part), part.shape())
        part.done(newer)
    return parts


Specs = Callable[[tuple[int, ...], torch.dtype], dict[str, PartSpec]]


def _specs(codec: Codec, where: str) -> Specs:
    """`codec.parts` with errors of this file's kind, remembering what it said: most chunks of an item are alike."""
    known: dict[tuple[int, ...], dict[str, PartSpec]] = {}

    def specs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, PartSpec]:
        if shape not in known:
            try:
                known[shape] = codec.parts(shape, dtype)
            except CodecError as error:
                raise FormatError(f"{where}: {error}") from error
        return known[shape]

    return specs


@dataclass(frozen=True)
class _Cut:
    """How an item may be cut: chunks tile it in order, stay within rows or take whole rows, and their parts add up."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, PartSpec]
    specs: Specs
    storage: str
    where: str
    newer: bool
    limits: Limits
    whole: bool  # the codec takes the tensor in one piece

    def chunks(self, values: list[Any]) -> tuple[StoredChunk, ...]:
        if not values:
            raise FormatError(f"{self.where}: it has no chunks")
        total, start = dict.fromkeys(self.parts, 0), 0
        chunks = []
        for value in values:
            chunk = self._chunk(value, start, whole=len(values) == 1)
            for name, spec in self.specs(chunk.shape, self.dtype).items():
                total[name] = total.get(name, 0) + spec.nbytes
            chunks.append(chunk)
            start = chunk.stop
        if start != math.prod(self.shape) or total != {name: spec.nbytes for name, spec in self.parts.items()}:
            raise FormatError(f"{self.where}: its chunks do not add up to the item")
        return tuple(chunks)

    def _chunk(self, value: object, start: int, whole: bool) -> StoredChunk:
        fields = Fields(value, self.where)
        shape = fields.shape()
        stop = start + math.prod(shape)
        if (shape != self.shape) if whole else not self._fits(shape, start, stop):
            raise FormatError(f"{self.where}: no chunk of shape {shape} can start at element {start}")
        nbytes = sum(spec.nbytes for spec in self.specs(shape, self.dtype).values())
        self.limits.check_chunk(self.where, math.prod(shape) * self.dtype.itemsize, nbytes, self.whole)
        if self.storage == PACKED:
            if nbytes > MAX_PACKED_CHUNK:
                raise LimitExceeded(f"{self.where}: a packed chunk of {nbytes:,} bytes; at most {MAX_PACKED_CHUNK:,}")
            nbytes = fields.integer("nbytes", 1 << 40)
            checksums: tuple[str, ...] = (fields.hexadecimal("checksum", 16),)
        else:
            checksums = tuple(hexadecimal(v, 16, self.where) for v in fields.take("checksums", list))
            if len(checksums) != len(self.parts):
                raise FormatError(f"{self.where}: {len(checksums)} checksums for {len(self.parts)} parts")
        fields.done(self.newer)
        return StoredChunk(start, stop, shape, nbytes, checksums)

    def _fits(self, shape: tuple[int, ...], start: int, stop: int) -> bool:
        if len(shape) != 2 or not self.shape or stop == start or stop > math.prod(self.shape):
            return False
        for trailing in range(1, max(len(self.shape), 2)):
            cols = math.prod(self.shape[-trailing:])
            whole, within = shape[1] == cols and start % cols == 0, start // cols == (stop - 1) // cols
            if whole or (shape[0] == 1 and within):
                return True
        return False
