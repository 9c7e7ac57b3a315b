"""Locates the tensors of torch.distributed.checkpoint (DCP): a folder with `.metadata` and one file or more per rank.

dcp_index.py reads `.metadata`. The shards hold what torch.save wrote: a chunk is a tensor, anything else a value. What
a healthy checkpoint does not have (a chunk that is missing, two that overlap, bytes past a file's end) is an error that
names it. What is only not understood (a compressed item, a transposed chunk) is carried as bytes.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from statecodec.dtypes import DType
from statecodec.errors import LayoutError, MalformedCheckpoint
from statecodec.files import ByteSource, PartOfBytes
from statecodec.layouts.base import Box, Crc32, LogicalTensor, Piece, Region, Shape, SourceFile, View
from statecodec.layouts.dcp_index import INDEX, DcpIndex, DcpItem, TensorAbout, nested, read_index
from statecodec.layouts.dcp_object import as_torch_saves, graph
from statecodec.layouts.graph import contiguous, storages
from statecodec.layouts.listing import Listing
from statecodec.layouts.objects import build, window
from statecodec.layouts.parts import is_run
from statecodec.layouts.payload import Payload
from statecodec.layouts.pickle.nodes import StorageNode, TensorNode
from statecodec.layouts.pickle.reader import read_pickle
from statecodec.layouts.protocol import Claim, Facts, Located
from statecodec.layouts.regions import physical_shape, stored_region
from statecodec.layouts.torch_zip import Archive, is_zip, open_archive, settle_storages
from statecodec.layouts.walk import Names, most_tensors
from statecodec.lazy import torch
from statecodec.names import shown

if TYPE_CHECKING:
    from torch import Tensor

name: Final = "dcp"

SHARD: Final = ".distcp"
_WHOLE: Final = "whole/"  # before the keys of tensors; storages inside of items have a number there


def claims(listing: Listing) -> Claim | None:
    """A folder's `.metadata` and `.distcp` files; or one shard alone, which is then refused with what to do."""
    folder = f"{listing.folder}/" if listing.folder else ""
    shards = [p for p in listing.files if p.endswith(SHARD) and "/" not in p[len(folder) :]]
    index = listing.get(INDEX)
    if index is not None and (shards or index.magic.startswith(b"\x80")):
        return Claim((f"{folder}{INDEX}", *shards))
    only = listing.only
    return Claim((only.path,)) if only is not None and only.path.endswith(SHARD) and is_zip(only.magic) else None


def locate(listing: Listing) -> Located:
    """Read `.metadata` and the headers of every item. Raises LayoutError."""
    with ExitStack() as stack:
        reading = _Reading(listing, stack)
        items = [reading.item(item) for item in reading.index.items]
        return _located(listing, reading.index, items)


def tree(listing: Listing, read: Payload) -> Any:
    """The nested dict that was saved, as torch.distributed.checkpoint.format_utils.dcp_to_torch_save gives it."""
    with ExitStack() as stack:
        reading = _Reading(listing, stack)
        index, items = reading.index, [reading.item(item) for item in reading.index.items]
    chunks: dict[str, list[_OpenItem]] = {key: [] for key in index.tensors}
    inner: dict[str, tuple[_OpenItem, str]] = {}
    loaded: dict[str, Tensor] = {}
    for number, each in enumerate(items):
        if each.item.box is not None:
            chunks[each.item.key].append(each)
        for key in each.archive.storages if each.archive else ():
            inner[f"{number}/{key}"] = (each, key)

    def tensor(key: str, dtype: DType, shape: Shape, stride: Shape, offset: int) -> Tensor:
        if key.startswith(_WHOLE):
            key = key.removeprefix(_WHOLE)
            return _whole(index.tensors[key], chunks[key], read)
        if key not in inner:  # a meta tensor: it never had bytes
            return torch.empty_strided(shape, stride, dtype=dtype.torch, device="meta")
        if key not in loaded:
            loaded[key] = _storage(*inner[key], read)
        return window(loaded[key], dtype, shape, stride, offset)

    nodes = _nodes(index)
    values: dict[str, Any] = {key: nodes.get(key) for key in index.keys}
    for each in items:
        if each.item.box is None:
            values[each.item.key] = _bytes(each.item, read) if each.archive is None else each.root
    return build(graph(nested(index, values)), tensor)


def _bytes(item: DcpItem, read: Payload) -> bytes:
    return read(item.file, item.offset, item.nbytes).cpu().numpy().tobytes()


# ---- what lies there


@dataclass(slots=True)
class _OpenItem:
    """An item, and what torch.save wrote there; `archive` is None where it is something else."""

    item: DcpItem
    archive: Archive | None = None
    root: Any = None
    value: bytes = b""
    """The bytes of a one-element tensor."""

    def chunk(self) -> TensorNode | None:
        return self.root if type(self.root) is TensorNode else None


class _Reading:
    """Opens the shards, one at a time, and the items in them."""

    def __init__(self, listing: Listing, stack: ExitStack) -> None:
        self.index = read_index(listing)
        self._listing, self._stack = listing, stack
        self._open: tuple[str, ByteSource] | None = None
        self._count = 0

    def item(self, item: DcpItem) -> _OpenItem:
        """Raises MalformedCheckpoint for a chunk that is not the tensor that it should be."""
        if self._open is None or self._open[0] != item.file:
            self._stack.close()
            self._open = item.file, self._stack.enter_context(self._listing.files[item.file].open())
        source = PartOfBytes(self._open[1], item.offset, item.nbytes, item.file)
        number, self._count = self._count, self._count + 1
        opened = _OpenItem(item)
        if item.plain and (item.box is not None or is_zip(source.read(0, min(4, item.nbytes)))):
            self._unpack(opened, source, number)
        return opened

    def _unpack(self, opened: _OpenItem, source: ByteSource, number: int) -> None:
        item = opened.item
        try:
            opened.archive = open_archive(source, item.file)
            opened.root = read_pickle(opened.archive.pickle)
            settle_storages(opened.root, opened.archive)
        except LayoutError as error:
            if item.box is not None:
                raise MalformedCheckpoint(f"{item.file}, {shown(item.key)!r:.80}: {error}") from None
            opened.archive, opened.root = None, None  # a value that only its own program understands
            return
        inside = {id(s): s for s in storages(opened.root, most_tensors(len(opened.archive.pickle)))}
        for storage in inside.values():  # one archive's keys are not another's
            storage.key = f"{number}/{storage.key}"
        if item.box is None:
            return
        node, about = opened.chunk(), self.index.tensors[item.key]
        if (
            node is None
            or (node.dtype, node.shape) != (about.dtype, item.box.shape)
            or node.storage.location == "meta"
            or math.prod(node.shape) * node.dtype.itemsize > item.nbytes
        ):
            raise MalformedCheckpoint(f"{item.file}: {shown(item.key)!r:.80} is not the chunk that {INDEX} says")
        if math.prod(about.size) == 1:
            entry = opened.archive.storages[_storage_key(node)]
            opened.value = source.read(entry.offset + node.offset * node.dtype.itemsize, node.dtype.itemsize)


def _storage(each: _OpenItem, key: str, read: Payload) -> Tensor:
    """The bytes of a storage in an item's archive."""
    assert each.archive is not None
    entry = each.archive.storages[key]
    return read(each.item.file, each.item.offset + entry.offset, entry.nbytes)


def _whole(about: TensorAbout, chunks: list[_OpenItem], read: Payload) -> Tensor:
    """A tensor put together from its chunks: from rows of it without a copy, from other parts of it one at a time."""
    if len(chunks) == 1:
        return _chunk(chunks[0], read)
    size = about.dtype.itemsize
    storage = read.take(math.prod(about.size) * size)
    whole = window(storage, about.dtype, about.size, contiguous(about.size), 0)
    for each in chunks:
        region, box = _region(each), each.item.box
        assert box is not None
        if region is not None and is_run(box, about.size):
            start = sum(o * step for o, step in zip(box.offset, contiguous(about.size), strict=True)) * size
            read.into(storage[start : start + region.nbytes], each.item.file, region.offset)
        else:
            chunk = _chunk(each, read.aside)
            whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] = chunk
            read.room.used(chunk.nbytes)
    return read.moved(whole)


def _chunk(each: _OpenItem, read: Payload) -> Tensor:
    node = each.chunk()
    if node is None:
        raise MalformedCheckpoint(
            f"{each.item.file}: {shown(each.item.key)!r:.80} is stored in a form that is not known"
        )
    storage = _storage(each, _storage_key(node), read)
    return window(storage, node.dtype, node.shape, node.stride, node.offset)


# ---- the saved object


def _nodes(index: DcpIndex) -> dict[str, TensorNode]:
    """Every tensor as a node, on a storage of its own."""
    nodes = {}
    for number, (key, about) in enumerate(index.tensors.items()):
        storage = StorageNode(f"{_WHOLE}{key}", about.dtype, "cpu", math.prod(about.size), untyped=False)
        nodes[key] = TensorNode(storage, about.dtype, about.size, contiguous(about.size), 0)
        nodes[key].index = number
    return nodes


# ---- putting it together


def _located(listing: Listing, index: DcpIndex, items: list[_OpenItem]) -> Located:
    regions: dict[str, list[tuple[Region, _OpenItem]]] = {path: [] for path in listing.files}
    crcs: dict[str, list[Crc32]] = {path: [] for path in listing.files}
    strange = {each.item.key for each in items if each.item.box is not None and _region(each) is None}
    for each in items:
        region = None if each.item.box is None or each.item.key in strange else _region(each)
        if region is not None:
            regions[each.item.file].append((region, each))
        for entry in each.archive.storages.values() if each.archive else ():
            if entry.crc and entry.nbytes:
                at = tuple(each.item.offset + a for a in entry.crc_at)
                crcs[each.item.file].append(Crc32(each.item.offset + entry.offset, entry.nbytes, at))
    pieces: dict[str, list[Piece]] = {key: [] for key in index.tensors if key not in strange}
    files = []
    for path, file in listing.files.items():
        views = []
        regions[path].sort(key=lambda r: (r[0].offset, r[0].nbytes))
        for number, (_, each) in enumerate(regions[path]):
            box, about = each.item.box, index.tensors[each.item.key]
            assert box is not None
            part = None if box.shape == about.size else box
            pieces[each.item.key].append(Piece(path, number, part))
            views.append(
                View(_view_name(each.item.key, part), number, about.dtype, box.shape, contiguous(box.shape), 0)
            )
        files.append(
            SourceFile(
                path,
                file.nbytes,
                file.mode,
                name,
                tuple(region for region, _ in regions[path]),
                tuple(views),
                tuple(crcs[path]),
                identity=file.identity,
            )
        )
    nodes, unique, prefix = _nodes(index), Names(), listing.prefix(listing.folder)
    tensors = tuple(
        LogicalTensor(
            unique.unique(prefix + shown(key)), about.dtype, about.size, tuple(sorted(pieces[key], key=_corner))
        )
        for key, about in index.tensors.items()
        if key in pieces
    )
    values = {key: nodes.get(key) for key in index.keys} | {f.item.key: f.root for f in items if f.item.box is None}
    scalars = {nodes[f.item.key].index: f.value for f in items if f.value}
    root = as_torch_saves(nested(index, values))
    windows = tuple((nodes[key],) for key in pieces)
    path = f"{listing.folder}/{INDEX}" if listing.folder else INDEX
    facts = Facts(path, root, index.limit + len(items), True, scalars, windows)
    count = len({item.file for item in index.items})
    made_by = f"torch.distributed.checkpoint, {count} file{'s' * (count > 1)}"
    return Located(tuple(files), tensors, facts=(facts,), framework=made_by)


def _region(each: _OpenItem) -> Region | None:
    """Where a chunk's numbers are; None if they are not one row-major run."""
    node = each.chunk()
    if node is None or each.archive is None or physical_shape(node.shape, node.stride) != node.shape:
        return None
    entry = each.archive.storages[_storage_key(node)]
    size = node.dtype.itemsize
    return stored_region(
        each.item.offset + entry.offset + node.offset * size, math.prod(node.shape) * size, node.dtype, node.shape
    )


def _storage_key(node: TensorNode) -> str:
    """The storage's key in the item's own archive."""
    return node.storage.key.partition("/")[2]


def _view_name(key: str, part: Box | None) -> str:
    if part is None:
        return shown(key)
    return f"{shown(key)}[{','.join(f'{o}:{o + n}' for o, n in zip(part.offset, part.shape, strict=True))}]"


def _corner(piece: Piece) -> Shape:
    return piece.part.offset if isinstance(piece.part, Box) else ()
