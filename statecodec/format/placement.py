"""Where everything goes, decided before the first byte is written: chunks, storage, shards, entry names, offsets.

A shard's data section is: the plain parts, widest dtype first (so that each is naturally aligned); the records of
packed and small items, whose sizes are known only once they are written; in the last shard, the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from statecodec.codecs import Encoding, PartSpec
from statecodec.codecs.chunking import Chunk, chunks
from statecodec.dtypes import DType
from statecodec.errors import FormatError, UsageError
from statecodec.format.container import MANIFEST_ENTRY, UNKNOWN_OFFSET, TensorEntry, build_header
from statecodec.format.entry_types import dtype_name, entry_type
from statecodec.format.items import PACKED, PLAIN, SHARED, packed_entry
from statecodec.format.packing import Packing
from statecodec.limits import MAX_CHUNKS, MAX_PACKED_CHUNK, Limits
from statecodec.strict import shape as check_shape

MIN_PACKED = 4096  # items with fewer bytes of parts share records: one each is not worth it
MANY_ITEMS = (
    1 << 16
)  # of so many, small ones share records even without packing: a header cannot hold an entry for each


@dataclass(frozen=True)
class ItemSpec:
    """A tensor to be written.

    Args:
        name: Its name, unique in the file.
        encoding: How it will be stored.
        shape: Shape of the decoded tensor.
        dtype: Dtype of the decoded tensor.
        attributes: JSON that is carried verbatim.
        companions: Role -> name of the item whose tensor the codec needs.
        text: Its bytes repeat each other, as those of headers and pickles do: they are packed accordingly.
        low_rank: Its codes are close to a matrix of low rank: what packing `auto` has to know.
        announced: The encoding that it had when the files were divided, where it has got another one since.
    """

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    dtype: DType
    attributes: dict[str, Any] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)
    text: bool = False
    low_rank: bool = False
    announced: Encoding | None = None

    def recoded(self, encoding: Encoding) -> ItemSpec:
        """The same tensor in another encoding, in the file where it was to be.

        Args:
            encoding: The other encoding.

        Returns:
            The new specification.
        """
        return replace(self, encoding=encoding, announced=self.announced or self.encoding)


@dataclass(frozen=True)
class Arrangement:
    """What follows from an item's encoding, shape and dtype: its parts, how it is cut, how it is stored."""

    parts: Mapping[str, PartSpec]
    chunks: Sequence[Chunk]
    storage: str


@dataclass(frozen=True)
class PlannedItem:
    """An item, and where it goes as far as that is known beforehand."""

    item: ItemSpec
    arrangement: Arrangement
    entry: str
    shard: int
    offsets: Mapping[str, int]  # of each plain part in the shard's data section

    @property
    def storage(self) -> str:
        """`packed`, `plain` or `shared`."""
        return self.arrangement.storage

    @property
    def parts(self) -> Mapping[str, PartSpec]:
        return self.arrangement.parts

    @property
    def chunks(self) -> Sequence[Chunk]:
        return self.arrangement.chunks


@dataclass(frozen=True)
class ShardPlan:
    """One file: its plain entries, where the records start in the data section, the header's reserved size."""

    plain: Sequence[TensorEntry]
    packed_start: int
    header_size: int


@dataclass(frozen=True)
class FilePlan:
    """Where all items of an output go, and its files."""

    items: list[PlannedItem]
    shards: Sequence[ShardPlan]


def plan(
    items: Sequence[ItemSpec], packing: Packing, max_shard_size: int | None, metadata: Mapping[str, str]
) -> FilePlan:
    """Plan a file. `metadata`: what its headers will hold, placeholders for digests.

    What the reader's limits would refuse is refused here. Raises UsageError, CodecError, LimitExceeded.
    """
    if max_shard_size is not None and max_shard_size < 1:
        raise UsageError(f"max_shard_size={max_shard_size}, expected at least 1 byte")
    limits = Limits()
    limits.check("items", len(items), limits.max_items)
    arrangements, names = _Arrangements(packing, len(items)), _Names()
    groups: list[list[PlannedItem]] = [[]]
    size = decoded = 0
    for item in items:
        arrangement = arrangements.of(item)
        parts = arrangement.parts if item.announced is None else item.announced.parts(tuple(item.shape), item.dtype)
        nbytes = sum(spec.nbytes for spec in parts.values())
        if max_shard_size is not None and size and size + nbytes > max_shard_size:
            groups.append([])
            size = 0
        size += nbytes
        decoded += math.prod(item.shape) * item.dtype.itemsize
        shard = len(groups) - 1
        groups[-1].append(PlannedItem(item, arrangement, names.claim(item.name, arrangement), shard, {}))
    limits.check("decoded bytes", decoded, limits.max_decoded_bytes)
    limits.check("shards", len(groups), limits.max_shards)
    _check_companions(items)
    planned = [_shard(group, metadata, limits) for group in groups]
    return FilePlan([item for group, _ in planned for item in group], [shard for _, shard in planned])


def _check_companions(items: Sequence[ItemSpec]) -> None:
    named = {item.name: item for item in items}
    for item in items:
        codec = item.encoding.codec
        for role in codec.needs:
            name = item.companions.get(role)
            other = named.get(name) if name is not None else None
            if other is None or tuple(other.shape) != tuple(item.shape) or not _may_serve(other, item):
                raise UsageError(
                    f"item {item.name!r}: {codec.name} needs the {role} of a tensor of shape {tuple(item.shape)}; "
                    f"{name!r} is no item of that shape that stands alone"
                )


def _may_serve(other: ItemSpec, item: ItemSpec) -> bool:
    """Whether an item can be a companion: it stands alone, or the other item repeats it."""
    if item.encoding.codec.repeats:
        return other.dtype == item.dtype and not other.encoding.codec.repeats
    return not other.encoding.codec.needs


def plain_items(items: Sequence[ItemSpec], packing: Packing) -> list[int]:
    """The indices of the items whose parts are entries of their own, at places fixed before anything is written."""
    arrangements = _Arrangements(packing, len(items))
    return [index for index, item in enumerate(items) if arrangements.of(item).storage == PLAIN]


def recoded(planned: PlannedItem, encoding: Encoding, packing: Packing, items: int) -> PlannedItem:
    """Another storage of an item that is not plain, in a file of so many items. Raises UsageError."""
    item = planned.item.recoded(encoding)
    arrangement = _Arrangements(packing, items).of(item)
    if PLAIN in (planned.storage, arrangement.storage):
        raise UsageError(f"item {item.name!r} cannot be stored in another way any more: its place was fixed")
    return replace(planned, item=item, arrangement=arrangement)


class _Arrangements:
    """The arrangements of a file's items; most of them are alike."""

    def __init__(self, packing: Packing, items: int) -> None:
        self._plain, self._many = packing.method == "none", items > MANY_ITEMS
        self._known: dict[tuple[Encoding, tuple[int, ...], DType], Arrangement] = {}

    def of(self, item: ItemSpec) -> Arrangement:
        shape = tuple(item.shape)
        key = (item.encoding, shape, item.dtype)
        if key not in self._known:
            self._known[key] = self._make(item, shape)
        return self._known[key]

    def _make(self, item: ItemSpec, shape: tuple[int, ...]) -> Arrangement:
        try:
            check_shape(list(shape), item.name)
            dtype_name(item.dtype)
        except (FormatError, KeyError) as error:
            raise UsageError(f"item {item.name!r}: {item.dtype} {shape} cannot be stored ({error})") from error
        footprint = math.prod(max(d, 1) for d in shape) * item.dtype.itemsize
        Limits().check(f"item {item.name!r}: decoded bytes", footprint, Limits.max_decoded_bytes)
        parts, pieces = item.encoding.parts(shape, item.dtype), chunks(item.encoding.codec, shape, item.dtype)
        if not parts:
            Limits().check(f"item {item.name!r}: chunks", len(pieces), MAX_CHUNKS)
        whole, largest = item.encoding.codec.in_pieces, 0
        for piece in {c.shape for c in pieces}:
            nbytes = item.encoding.nbytes(piece, item.dtype)
            Limits().check_chunk(f"item {item.name!r}", math.prod(piece) * item.dtype.itemsize, nbytes, whole)
            largest = max(largest, nbytes)
        small = len(pieces) == 1 and largest < MIN_PACKED
        if not parts or largest > MAX_PACKED_CHUNK or (self._plain and not (small and self._many)):
            return Arrangement(parts, pieces, PLAIN)
        return Arrangement(parts, pieces, SHARED if small else PACKED)


class _Names:
    """Item names, and entry names that cannot collide: a second `a/codes` becomes `a/codes#2`."""

    def __init__(self) -> None:
        self.items: set[str] = set()
        self.entries: set[str] = set()

    def claim(self, item: str, arrangement: Arrangement) -> str:
        """The base of the item's entry names. Raises UsageError."""
        if item in self.items:
            raise UsageError(f"two items are named {item!r}")
        try:
            item.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"item name {item!r} is not valid Unicode") from None
        self.items.add(item)
        if arrangement.storage != PLAIN:
            return item
        entry, attempt = item, 1
        while any(f"{entry}/{part}" in self.entries for part in arrangement.parts):
            attempt += 1
            entry = f"{item}#{attempt}"
        self.entries.update(f"{entry}/{part}" for part in arrangement.parts)
        return entry


def _shard(
    group: Sequence[PlannedItem], metadata: Mapping[str, str], limits: Limits
) -> tuple[list[PlannedItem], ShardPlan]:
    plain = [(i, part, spec) for i, p in enumerate(group) if p.storage == PLAIN for part, spec in p.parts.items()]
    plain.sort(key=lambda entry: -entry[2].dtype.itemsize)
    offsets: dict[int, dict[str, int]] = {}
    entries, position = [], 0
    for i, part, spec in plain:
        offsets.setdefault(i, {})[part] = position
        dtype, shape = entry_type(spec)
        entries.append(TensorEntry(f"{group[i].entry}/{part}", dtype, shape, position, position + spec.nbytes))
        position += spec.nbytes
    unknown = ((UNKNOWN_OFFSET,), UNKNOWN_OFFSET, UNKNOWN_OFFSET)
    widest = [TensorEntry(name, "U8", *unknown) for name in (packed_entry(limits.max_shards), MANIFEST_ENTRY)]
    header, _ = build_header([*entries, *widest], metadata)
    limits.check(f"header bytes for {len(entries):,} plain parts", len(header) - 8, limits.max_header_bytes)
    items = [replace(p, offsets=offsets[i]) if i in offsets else p for i, p in enumerate(group)]
    return items, ShardPlan(entries, position, len(header))
