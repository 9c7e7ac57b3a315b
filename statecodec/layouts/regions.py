"""Cuts a storage into regions, by the windows that tensors are on it.

A cluster of windows that touch the same bytes becomes one region. If all of them run through it densely (contiguous, or
permuted like a transpose or channels_last) in one dtype, the region is an ordinary tensor in physical order; otherwise
(strided, expanded, partly overlapping, of several dtypes) it is `lossless`. Bytes between the windows that belong to no
tensor stay skeleton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from statecodec.dtypes import NUMBERS, UINT8, DType
from statecodec.layouts.base import Region
from statecodec.layouts.pickle.nodes import StorageNode, TensorNode


@dataclass(slots=True)
class NamedRegion:
    """A region of one storage, its name, and the windows into it.

    A window is (name, tensor, offset in elements of the tensor's dtype).
    """

    region: Region
    name: str
    """The first view's, or that of the storage where no tensor looks at it. Unique in the file."""
    windows: list[tuple[str, TensorNode, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Cluster:
    start: int
    stop: int
    windows: list[tuple[str, TensorNode]]


def physical_shape(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape in memory order of a window that covers a contiguous range exactly once; None if it does not.

    Contiguous windows keep their shape; permuted ones lose their dimensions of size 1.
    """
    dims = [(step, size) for size, step in zip(shape, stride, strict=True) if size != 1]
    if _is_dense(dims):
        return shape
    dims.sort(key=lambda d: -d[0])
    return tuple(size for _, size in dims) if _is_dense(dims) else None


def _is_dense(dims: list[tuple[int, int]]) -> bool:
    expected = 1
    for step, size in reversed(dims):
        if step != expected:
            return False
        expected *= size
    return True


def cut(
    storage: StorageNode, offset: int, nbytes: int, windows: list[tuple[str, TensorNode]], name: str
) -> list[NamedRegion]:
    """The regions of a storage that lies at file[offset:offset+nbytes].

    `windows` are the named tensors on it; `name` is used where there are none (the bytes are then kept losslessly).
    """
    empty = [w for w in windows if math.prod(w[1].shape) == 0]
    solid = [w for w in windows if math.prod(w[1].shape) != 0]
    if nbytes == 0:
        if not empty:
            return []
        first_name, first = empty[0]
        return [
            NamedRegion(stored_region(offset, 0, first.dtype, first.shape), first_name, [(n, t, 0) for n, t in empty])
        ]
    if not solid:
        region_name = windows[0][0] if windows else name
        whole = stored_region(offset, nbytes, *_flat(storage.dtype, nbytes), lossless=True)
        return [NamedRegion(whole, region_name, [(n, t, 0) for n, t in empty])]
    cuts = [_cut(cluster, offset) for cluster in _clusters(solid, nbytes)]
    cuts[0].windows += [(n, t, 0) for n, t in empty]
    return cuts


def stored_region(offset: int, nbytes: int, dtype: DType, shape: tuple[int, ...], *, lossless: bool = False) -> Region:
    """A region of numbers, or of bytes where the dtype is not one that can be encoded."""
    if dtype not in NUMBERS:
        dtype, shape = UINT8, (nbytes,)
    return Region(offset, nbytes, dtype, shape, lossless)


def _flat(dtype: DType, nbytes: int) -> tuple[DType, tuple[int, ...]]:
    if nbytes % dtype.itemsize:
        return UINT8, (nbytes,)
    return dtype, (nbytes // dtype.itemsize,)


def _extent(node: TensorNode) -> tuple[int, int]:
    last = node.offset + sum((size - 1) * step for size, step in zip(node.shape, node.stride, strict=True))
    return node.offset * node.dtype.itemsize, (last + 1) * node.dtype.itemsize


def _clusters(windows: list[tuple[str, TensorNode]], nbytes: int) -> list[_Cluster]:
    """Groups of windows that share bytes, in storage order. Mixed dtypes that share bytes take the whole storage."""
    spans = sorted(((*_extent(node), i) for i, (_, node) in enumerate(windows)))
    clusters: list[_Cluster] = []
    for start, stop, i in spans:
        if clusters and start < clusters[-1].stop:
            clusters[-1].stop = max(clusters[-1].stop, stop)
            clusters[-1].windows.append(windows[i])
        else:
            clusters.append(_Cluster(start, stop, [windows[i]]))
    # Only from the storage's first byte on is every window of every dtype at a whole number of its elements.
    if any(len({node.dtype for _, node in c.windows}) > 1 for c in clusters):
        return [_Cluster(0, nbytes, list(windows))]
    return clusters


def _cut(cluster: _Cluster, offset: int) -> NamedRegion:
    first_name, first = cluster.windows[0]
    span = cluster.stop - cluster.start
    shapes = {
        physical_shape(node.shape, node.stride) if _extent(node) == (cluster.start, cluster.stop) else None
        for _, node in cluster.windows
    }
    shape = physical_shape(first.shape, first.stride)
    dtypes = {node.dtype for _, node in cluster.windows}
    if len(dtypes) == 1 and None not in shapes and shape is not None:
        region = stored_region(offset + cluster.start, span, first.dtype, shape)
    else:
        dtype = first.dtype if len(dtypes) == 1 else UINT8
        region = stored_region(offset + cluster.start, span, *_flat(dtype, span), lossless=True)
    return NamedRegion(
        region, first_name, [(n, t, t.offset - cluster.start // t.dtype.itemsize) for n, t in cluster.windows]
    )
