"""Between a file's parser and its SourceFile: the description, then the regions once every file's roles are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from statecodec.files import ByteSource
from statecodec.layouts.base import Crc32, Moments, Region, SourceFile, View
from statecodec.layouts.facts.assign import FileRoles
from statecodec.layouts.pickle.nodes import StorageNode, TensorNode
from statecodec.layouts.regions import Cut, cut
from statecodec.layouts.walk import Names, walk

_BYTES: Final = torch.uint8


@dataclass(frozen=True)
class Span:
    """Where a storage's bytes lie in the file."""

    offset: int
    nbytes: int


@dataclass
class Described:
    """One understood file: its object graph, and where its storages are."""

    path: str
    nbytes: int
    mode: int
    layout: str
    root: Any
    ordered: bool
    cuts: list[Cut]
    names: list[str]
    """View names in the file's own order."""
    crcs: tuple[Crc32, ...]
    scalars: dict[int, bytes]
    """Tensor's index -> bytes, of every one-element tensor: steps and learning rates are kept as such."""

    def for_roles(self) -> FileRoles:
        return FileRoles(self.path, self.root, self.ordered, self.scalars)


def read_scalars(source: ByteSource, cuts: list[Cut]) -> dict[int, bytes]:
    """The bytes of every one-element tensor, by its index."""
    return {
        node.index: source.read(piece.region.offset + offset * node.dtype.itemsize, node.dtype.itemsize)
        for piece in cuts
        for _, node, offset in piece.windows
        if math.prod(node.shape) == 1
    }


def cut_all(root: Any, spans: dict[str, Span]) -> tuple[list[Cut], list[str]]:
    """All regions (sorted by offset) of the storages in `spans`, and the names of all views in order.

    On the way every tensor gets its index.
    """
    unique, order, count = Names(), [], 0
    windows: dict[str, list[tuple[str, TensorNode]]] = {}
    storages: dict[str, StorageNode] = {}
    for place, node in walk(root):
        storage = node.storage if type(node) is TensorNode else node if type(node) is StorageNode else None
        if type(node) is TensorNode and node.index < 0:
            node.index, count = count, count + 1
        if storage is None or storage.key not in spans:
            continue
        storages.setdefault(storage.key, storage)
        if type(node) is TensorNode:
            order.append(unique.unique(str(place)))
            windows.setdefault(storage.key, []).append((order[-1], node))
    cuts: list[Cut] = []
    for key, span in spans.items():
        storage = storages.get(key) or StorageNode(key, _BYTES, "cpu", span.nbytes, untyped=True)
        seen = windows.get(key, [])
        cuts += cut(storage, span.offset, span.nbytes, seen, "" if seen else unique.unique(f"storage:{key}"[:200]))
    cuts.sort(key=lambda c: (c.region.offset, c.region.nbytes))
    return cuts, order


def finish(described: Described, roles: FileRoles) -> SourceFile:
    """The SourceFile, with roles, parameter names and moments filled in."""
    regions, views = [], {}
    region_of: dict[int, Region] = {}
    for index, piece in enumerate(described.cuts):
        nodes = [node for _, node, _ in piece.windows]
        found_roles = {roles.roles.get(node.index, "other") for node in nodes}
        params = {roles.params.get(node.index) for node in nodes} - {None}
        role = found_roles.pop() if len(found_roles) == 1 else "other"
        # Tied weights have several names, and the first is the one that Module.parameters() knows.
        param = next((p for node in nodes if (p := roles.params.get(node.index))), None) if role == "weight" else None
        if role != "weight" and len(params) == 1:
            param = next(iter(params))
        region = replace(piece.region, role=role, param=param)
        regions.append(region)
        for name, node, offset in piece.windows:
            views[name] = View(name, index, node.dtype, node.shape, node.stride, offset)
            if not region.lossless:
                region_of[node.index] = region
    moments = []
    for adam in roles.adam:
        m, v = region_of.get(adam.exp_avg.index), region_of.get(adam.exp_avg_sq.index)
        if m is None or v is None:
            continue
        weight = None if adam.weight is None else region_of.get(adam.weight.index)
        moments.append(
            Moments(
                adam.param, m.name, v.name, None if weight is None else weight.name, adam.beta1, adam.beta2, adam.eps,
                adam.lr, adam.weight_decay, adam.step,
            )
        )  # fmt: skip
    return SourceFile(
        described.path, described.nbytes, described.mode, described.layout, tuple(regions),
        tuple(views[name] for name in described.names), described.crcs, tuple(moments),
    )  # fmt: skip
