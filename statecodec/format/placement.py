"""Where everything goes, decided before the first byte is written: chunks, storage, shards, entry names, plain offsets.

A shard's data section is: the plain parts, widest dtype first (so that each is naturally aligned); the packed items,
whose sizes are known only once they are written; in the last shard, the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from statecodec.codecs import Codec, PartSpec
from statecodec.codecs.chunking import Chunk, chunks
from statecodec.errors import FormatError, UsageError
from statecodec.format.container import MANIFEST_ENTRY, METADATA, UNKNOWN_OFFSET, Entry, build_header
from statecodec.format.entry_types import dtype_name, entry_type
from statecodec.format.manifest import PACKED, PLAIN
from statecodec.format.packing import Packing
from statecodec.limits import MAX_PACKED_CHUNK, Limits
from statecodec.strict import shape as check_shape

MIN_PACKED = 4096  # items with fewer bytes of parts stay plain: readable by name, and not worth a record


@dataclass(frozen=True)
class Item:
    """A tensor to be written: name, codec, decoded shape and dtype, and attributes (JSON, carried verbatim).

    `companions`: by role, the names of the items whose tensors the codec needs.
    """

    name: str
    codec: Codec
    shape: tuple[int, ...]
    dtype: torch.dtype
    attributes: dict[str, Any] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedItem:
    """An item with everything that is known of it beforehand."""

    item: Item
    entry: str
    storage: str
    shard: int
    parts: Mapping[str, PartSpec]
    chunks: Sequence[Chunk]
    offsets: Mapping[str, int]  # of each plain part in the shard's data section


@dataclass(frozen=True)
class Shard:
    """One file: its plain entries, where the packed region starts in the data section, the header's reserved size."""

    plain: Sequence[Entry]
    packed_start: int
    header_size: int


@dataclass(frozen=True)
class Plan:
    items: list[PlannedItem]
    shards: Sequence[Shard]


def plan(items: Sequence[Item], packing: Packing, max_shard_size: int | None, metadata: Mapping[str, str]) -> Plan:
    """Plan a file. `metadata`: what its headers will hold, placeholders for digests. Raises UsageError, CodecError."""
    if max_shard_size is not None and max_shard_size < 1:
        raise UsageError(f"max_shard_size={max_shard_size}, expected at least 1 byte")
    names = _Names()
    drafts: list[PlannedItem] = []
    sizes = [0]
    for item in items:
        draft = _draft(item, packing, names)
        size = sum(spec.nbytes for spec in draft.parts.values())
        if max_shard_size is not None and sizes[-1] and sizes[-1] + size > max_shard_size:
            sizes.append(0)
        sizes[-1] += size
        drafts.append(PlannedItem(item, draft.entry, draft.storage, len(sizes) - 1, draft.parts, draft.chunks, {}))
    groups: list[list[PlannedItem]] = [[] for _ in sizes]
    for draft in drafts:
        groups[draft.shard].append(draft)
    _check_companions(items)
    planned = [_shard(group, metadata) for group in groups]
    return Plan([item for group, _ in planned for item in group], [shard for _, shard in planned])


def _check_companions(items: Sequence[Item]) -> None:
    named = {item.name: item for item in items}
    for item in items:
        for role in item.codec.needs:
            name = item.companions.get(role)
            other = named.get(name) if name is not None else None
            if other is None or tuple(other.shape) != tuple(item.shape) or other.codec.needs:
                raise UsageError(
                    f"item {item.name!r}: {item.codec.name} needs the {role} of a tensor of shape {tuple(item.shape)}; "
                    f"{name!r} is no item of that shape that stands alone"
                )


def is_plain(item: Item, packing: Packing) -> bool:
    """Whether an item's parts stand in the file one by one, at places fixed before anything is written."""
    shape = tuple(item.shape)
    largest = max(
        item.codec.nbytes(piece, item.dtype) for piece in {c.shape for c in chunks(item.codec, shape, item.dtype)}
    )
    return _is_plain(item.codec.nbytes(shape, item.dtype), largest, packing)


def _is_plain(nbytes: int, largest_chunk: int, packing: Packing) -> bool:
    return packing.method == "none" or nbytes < MIN_PACKED or largest_chunk > MAX_PACKED_CHUNK


def recoded(planned: PlannedItem, codec: Codec) -> PlannedItem:
    """A packed item under another codec, in the same place."""
    item = replace(planned.item, codec=codec)
    shape = tuple(item.shape)
    return replace(planned, item=item, parts=codec.parts(shape, item.dtype), chunks=chunks(codec, shape, item.dtype))


class _Names:
    """Item names, and entry names that cannot collide: a second `a/codes` becomes `a/codes#2`."""

    def __init__(self) -> None:
        self.items: set[str] = set()
        self.entries = {MANIFEST_ENTRY, METADATA}

    def claim(self, item: str, suffixes: Sequence[str]) -> str:
        if item in self.items:
            raise UsageError(f"two items are named {item!r}")
        try:
            item.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"item name {item!r} is not valid Unicode") from None
        self.items.add(item)
        entry, attempt = item, 1
        while any(entry + suffix in self.entries for suffix in suffixes):
            attempt += 1
            entry = f"{item}#{attempt}"
        self.entries.update(entry + suffix for suffix in suffixes)
        return entry


def _draft(item: Item, packing: Packing, names: _Names) -> PlannedItem:
    shape = tuple(item.shape)
    try:
        check_shape(list(shape), item.name)
        dtype_name(item.dtype)
    except (FormatError, KeyError) as error:
        raise UsageError(f"item {item.name!r}: {item.dtype} {shape} cannot be stored ({error})") from error
    parts = item.codec.parts(shape, item.dtype)
    pieces = chunks(item.codec, shape, item.dtype)
    whole, largest = item.codec.align(shape) is None, 0
    for piece in {c.shape for c in pieces}:
        nbytes = sum(s.nbytes for s in item.codec.parts(piece, item.dtype).values())
        Limits().check_chunk(f"item {item.name!r}", math.prod(piece) * item.dtype.itemsize, nbytes, whole)
        largest = max(largest, nbytes)
    storage = PLAIN if _is_plain(sum(spec.nbytes for spec in parts.values()), largest, packing) else PACKED
    suffixes = [""] if storage == PACKED else [f"/{part}" for part in parts]
    return PlannedItem(item, names.claim(item.name, suffixes), storage, 0, parts, pieces, {})


def _shard(group: Sequence[PlannedItem], metadata: Mapping[str, str]) -> tuple[list[PlannedItem], Shard]:
    plain = [(i, part, spec) for i, p in enumerate(group) if p.storage == PLAIN for part, spec in p.parts.items()]
    plain.sort(key=lambda entry: -entry[2].dtype.itemsize)
    offsets: list[dict[str, int]] = [{} for _ in group]
    entries, position = [], 0
    for i, part, spec in plain:
        offsets[i][part] = position
        dtype, shape = entry_type(spec)
        entries.append(Entry(f"{group[i].entry}/{part}", dtype, shape, position, position + spec.nbytes))
        position += spec.nbytes
    widest = [
        Entry(name, "U8", (UNKNOWN_OFFSET,), UNKNOWN_OFFSET, UNKNOWN_OFFSET)
        for name in [p.entry for p in group if p.storage == PACKED] + [MANIFEST_ENTRY]
    ]
    header, _ = build_header([*entries, *widest], metadata)
    items = [
        PlannedItem(p.item, p.entry, p.storage, p.shard, p.parts, p.chunks, offsets[i]) for i, p in enumerate(group)
    ]
    return items, Shard(entries, position, len(header))
