"""From an object graph over storages (a torch file's pickle, a safetensors header) to regions, tensors and views."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from statecodec.dtypes import UINT8, DType
from statecodec.files import ByteSource
from statecodec.layouts.base import Crc32, LogicalTensor, Piece, SourceFile, View
from statecodec.layouts.listing import ListedFile
from statecodec.layouts.pickle.nodes import StorageNode, TensorNode
from statecodec.layouts.protocol import Facts, Located
from statecodec.layouts.regions import NamedRegion, cut
from statecodec.layouts.walk import Names, walk

_BYTES: Final = UINT8


@dataclass(frozen=True, slots=True)
class Span:
    """Where a storage's bytes lie in the file."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Graph:
    """One file's objects and where its storages are.

    Args:
        root: The object graph (pickle/nodes.py).
        spans: Storage key -> its bytes.
        limit: How many tensors it may name.
        ordered: Its tensors stand in the model's order.
        crcs: CRC-32s that stand in the file.
    """

    root: Any
    spans: dict[str, Span]
    limit: int
    ordered: bool
    crcs: tuple[Crc32, ...] = ()

    def located(self, layout: str, file: ListedFile, source: ByteSource, prefix: str) -> Located:
        """The file with its regions and views, and a tensor for every region; reads one-element tensors only.

        Args:
            layout: Name of the layout.
            file: The file that the graph is of.
            source: Its bytes.
            prefix: What the names of tensors begin with.
        """
        cuts, order = _cut_all(self.root, self.spans, self.limit)
        views = {
            name: View(name, index, node.dtype, node.shape, node.stride, offset)
            for index, piece in enumerate(cuts)
            for name, node, offset in piece.windows
        }
        source_file = SourceFile(
            file.path,
            file.nbytes,
            file.mode,
            layout,
            tuple(piece.region for piece in cuts),
            tuple(views[name] for name in order),
            self.crcs,
            identity=file.identity,
        )
        tensors = tuple(
            LogicalTensor(prefix + piece.name, *_dtype_and_shape(piece), (Piece(file.path, index),))
            for index, piece in enumerate(cuts)
        )
        windows = tuple(tuple(node for _, node, _ in piece.windows) for piece in cuts)
        shared = frozenset(i for i, region in enumerate(source_file.regions) if region.lossless)
        facts = Facts(file.path, self.root, self.limit, self.ordered, dict(_scalars(source, cuts)), windows, shared)
        return Located((source_file,), tensors, facts=(facts,))


def storages(root: Any, limit: int) -> Iterator[StorageNode]:
    """The storages of all tensors, and those that no tensor uses, in order."""
    for _, node in walk(root, limit):
        if type(node) is TensorNode:
            yield node.storage
        elif type(node) is StorageNode:
            yield node


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, as torch counts them (dimensions of size 0 as 1)."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _dtype_and_shape(piece: NamedRegion) -> tuple[DType, tuple[int, ...]]:
    """The file's own dtype and shape, where a dtype that cannot be encoded made the region one of bytes."""
    region = piece.region
    if region.dtype is _BYTES and len(piece.windows) == 1 and not region.lossless:
        node = piece.windows[0][1]
        return node.dtype, node.shape
    return region.dtype, region.shape


def _scalars(source: ByteSource, cuts: list[NamedRegion]) -> Iterator[tuple[int, bytes]]:
    """Index and bytes of every one-element tensor."""
    for piece in cuts:
        for _, node, offset in piece.windows:
            if math.prod(node.shape) == 1:
                size = node.dtype.itemsize
                yield node.index, source.read(piece.region.offset + offset * size, size)


def _cut_all(root: Any, spans: dict[str, Span], limit: int) -> tuple[list[NamedRegion], list[str]]:
    """All regions (sorted by offset) of the storages in `spans`, and the names of all views in order.

    On the way every tensor gets its index.
    """
    unique, order, count = Names(), [], 0
    windows: dict[str, list[tuple[str, TensorNode]]] = {}
    storages: dict[str, StorageNode] = {}
    for path, node in walk(root, limit):
        if type(node) is TensorNode and node.index < 0:
            node.index, count = count, count + 1
        storage = node.storage if type(node) is TensorNode else node if type(node) is StorageNode else None
        if storage is None or storage.key not in spans:
            continue
        storages.setdefault(storage.key, storage)
        if type(node) is TensorNode:
            order.append(unique.unique(str(path)))
            windows.setdefault(storage.key, []).append((order[-1], node))
    cuts: list[NamedRegion] = []
    for key, span in spans.items():
        storage = storages.get(key) or StorageNode(key, _BYTES, "cpu", span.nbytes, untyped=True)
        seen = windows.get(key, [])
        cuts += cut(storage, span.offset, span.nbytes, seen, "" if seen else unique.unique(f"storage:{key}"[:200]))
    cuts.sort(key=lambda c: (c.region.offset, c.region.nbytes))
    return cuts, order
