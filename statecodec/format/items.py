"""The items of a file, and the checks that all versions of the manifest share. What is read is untrusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from statecodec.codecs import Codec, Encoding, PartSpec
from statecodec.codecs.chunking import Chunk
from statecodec.dtypes import STORED, DType
from statecodec.errors import CodecError, FormatError, LimitExceeded, UnknownCodec, UnsupportedVersion
from statecodec.format.entry_types import dtype_name, entry_type
from statecodec.limits import MAX_PACKED_CHUNK, Limits
from statecodec.strict import Fields

PLAIN, PACKED, SHARED = "plain", "packed", "shared"

Specs = Callable[[tuple[int, ...], DType], dict[str, PartSpec]]


@dataclass(frozen=True)
class StoredChunk(Chunk):
    """A chunk in a file.

    Args:
        start: The first element.
        stop: One past the last element.
        shape: The shape in which it is encoded.
        nbytes: Bytes of its record (packed), its parts (plain) or its share of a record (shared).
        checksums: One (packed), one per part (plain), none (shared).
    """

    nbytes: int
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class StoredRecord:
    """A record that several small items share.

    Args:
        shard: The file that it is in.
        start: Its first byte in that file's entry of packed records.
        nbytes: Its length.
        checksum: Its XXH3-64, in hexadecimal.
        items: Indices of the items that it holds.
    """

    shard: int
    start: int
    nbytes: int
    checksum: str
    items: tuple[int, ...]


@dataclass(frozen=True)
class StoredItem:
    """One encoded tensor in a file.

    Args:
        name: Its name.
        encoding: Its codec, and the change since a base, if it is one.
        shape: Shape of the decoded tensor.
        dtype: Dtype of the decoded tensor.
        storage: `packed`, `plain` or `shared`.
        parts: Dtype and shape of the whole tensor's parts.
        chunks: Its chunks, in order.
        attributes: JSON that the writer's caller gave.
        shard: The file that it is in, from 0.
        entry: What the names of its entries begin with (plain), or the entry in which its records lie one after the
            other (packed).
        start: First byte of its records in that entry (packed).
        record: The record that it shares (shared).
        companions: Role -> name of the item that decoding needs.
    """

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    dtype: DType
    storage: str
    parts: Mapping[str, PartSpec]
    chunks: tuple[StoredChunk, ...]
    attributes: Mapping[str, Any]
    shard: int
    entry: str
    start: int = 0
    record: StoredRecord | None = field(default=None, repr=False)
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
        """Bytes of the decoded tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def plain_entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The safetensors entries of a plain item's parts: name -> (dtype, shape)."""
        return {f"{self.entry}/{part}": entry_type(spec) for part, spec in self.parts.items()}


def packed_entry(shard: int) -> str:
    """The entry that holds all records of a shard, since format 2.0."""
    return f"__packed_{shard}__"


def shares(record: int, sizes: Iterable[int]) -> list[int]:
    """A record's bytes, divided among the items that share it in proportion to theirs; they add up."""
    weights = [size + 1 for size in sizes]  # an item may have no bytes at all
    total, dealt, sofar, parts = sum(weights), 0, 0, []
    for weight in weights:
        sofar += weight
        parts.append(record * sofar // total - dealt)
        dealt += parts[-1]
    return parts


def read_dtype(fields: Fields) -> DType:
    """The field `dtype`. Raises UnsupportedVersion."""
    name = fields.take("dtype", str)
    if name not in STORED:
        raise UnsupportedVersion(f"{fields.where}: unknown dtype {name[:40]!r}")
    return STORED[name]


def read_encoding(fields: Fields) -> Encoding:
    """The field `codec`. Raises UnsupportedVersion for one this version does not know, FormatError."""
    config = fields.take("codec", dict)
    try:
        return Encoding.from_config(config)
    except UnknownCodec as error:
        raise UnsupportedVersion(f"{fields.where}: {error}; a newer statecodec may have it") from error
    except CodecError as error:
        raise FormatError(f"{fields.where}: {error}") from error


def read_companions(value: Any, codec: Codec, where: str) -> Mapping[str, str]:
    """The companions of an item, by role: exactly those that its codec needs. Raises FormatError."""
    names = value if isinstance(value, dict) else {}
    if set(names) != set(codec.needs) or not all(isinstance(name, str) for name in names.values()):
        raise FormatError(f"{where}: {codec.name} needs {', '.join(codec.needs) or 'no'} companions")
    return names


def read_parts(fields: Fields, newer: bool) -> dict[str, PartSpec]:
    """The field `parts`."""
    parts = {}
    for name, value in fields.take("parts", dict).items():
        part = Fields(value, f"{fields.where}: part {name[:80]!r}")
        parts[name] = PartSpec(read_dtype(part), part.shape())
        part.done(newer)
    return parts


def parts_json(parts: Mapping[str, PartSpec]) -> dict[str, Any]:
    """The field `parts`, to be written."""
    return {k: {"dtype": dtype_name(s.dtype), "shape": list(s.shape)} for k, s in parts.items()}


def checked_specs(encoding: Encoding, where: str) -> Specs:
    """A cached `encoding.parts` that raises FormatError: most chunks of an item are alike."""
    by_shape: dict[tuple[int, ...], dict[str, PartSpec]] = {}

    def specs(shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        if shape not in by_shape:
            try:
                by_shape[shape] = encoding.parts(shape, dtype)
            except CodecError as error:
                raise FormatError(f"{where}: {error}") from error
        return by_shape[shape]

    return specs


@dataclass(frozen=True)
class DeclaredTensor:
    """What the manifest says of a tensor before it says how it is cut, checked."""

    encoding: Encoding
    dtype: DType
    shape: tuple[int, ...]
    storage: str
    parts: Mapping[str, PartSpec]

    @classmethod
    def read(cls, fields: Fields, storages: tuple[str, ...], newer: bool, limits: Limits) -> DeclaredTensor:
        """Read and check the fields dtype, shape, codec, storage and parts. Raises FormatError and its subclasses."""
        dtype, shape = read_dtype(fields), fields.shape()
        # Zero-size dimensions count as one: a shape of (0, 2**60) is refused as well.
        footprint = math.prod(max(d, 1) for d in shape) * dtype.itemsize
        limits.check(f"{fields.where}: decoded bytes", footprint, limits.max_decoded_bytes)
        encoding = read_encoding(fields).settled(shape)
        storage = fields.take("storage", str)
        if storage not in storages:
            raise UnsupportedVersion(
                f"{fields.where}: storage {storage[:40]!r}; this reader knows {' and '.join(storages)}"
            )
        specs, parts = checked_specs(encoding, fields.where)(shape, dtype), read_parts(fields, newer)
        if parts != specs or list(parts) != list(specs):
            raise FormatError(f"{fields.where}: its parts are not those of {encoding} for {dtype} {shape}")
        return cls(encoding, dtype, shape, storage, parts)

    def cut(self, shapes: Iterable[tuple[int, ...]], count: int, where: str, limits: Limits) -> list[Chunk]:
        """The chunks of these shapes, `count` in all. Raises FormatError.

        They must tile the tensor in order, stay within rows or take whole rows, and their parts must add up to its own.
        """
        specs, whole = checked_specs(self.encoding, where), self.encoding.codec.in_pieces
        if not count:
            raise FormatError(f"{where}: it has no chunks")
        total, start, chunks = dict.fromkeys(self.parts, 0), 0, []
        for shape in shapes:
            stop = start + math.prod(shape)
            if (shape != self.shape) if count == 1 else not self._fits(shape, start, stop):
                raise FormatError(f"{where}: no chunk of shape {shape} can start at element {start}")
            parts = specs(shape, self.dtype)
            nbytes = sum(spec.nbytes for spec in parts.values())
            limits.check_chunk(where, math.prod(shape) * self.dtype.itemsize, nbytes, whole)
            if self.storage != PLAIN and nbytes > MAX_PACKED_CHUNK:
                raise LimitExceeded(f"{where}: a packed chunk of {nbytes:,} bytes; at most {MAX_PACKED_CHUNK:,}")
            for name, spec in parts.items():
                total[name] = total.get(name, 0) + spec.nbytes
            chunks.append(Chunk(start, stop, shape))
            start = stop
        if start != math.prod(self.shape) or total != {name: spec.nbytes for name, spec in self.parts.items()}:
            raise FormatError(f"{where}: its chunks do not add up to the item")
        return chunks

    def _fits(self, shape: tuple[int, ...], start: int, stop: int) -> bool:
        if len(shape) != 2 or not self.shape or stop == start or stop > math.prod(self.shape):
            return False
        for trailing in range(1, max(len(self.shape), 2)):
            cols = math.prod(self.shape[-trailing:])
            whole, within = shape[1] == cols and start % cols == 0, start // cols == (stop - 1) // cols
            if whole or (shape[0] == 1 and within):
                return True
        return False


@dataclass(frozen=True)
class ItemCheck:
    """The result of verifying one item.

    Args:
        name: Its name.
        nbytes: Its stored bytes.
        error: What is wrong with it; None if it is intact.
    """

    name: str
    nbytes: int
    error: FormatError | None
