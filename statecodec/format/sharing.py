"""What a record packs that small items share: for each dtype one vector, the items' parts one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from statecodec.buffers import Bytes
from statecodec.codecs import PartSpec
from statecodec.dtypes import DType
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, PartSpec]


def specs(items: Sequence[Parts]) -> list[PartSpec]:
    """What the vectors are: in the order in which dtypes first occur."""
    numel: dict[DType, int] = {}
    for parts in items:
        for spec in parts.values():
            numel[spec.dtype] = numel.get(spec.dtype, 0) + spec.numel
    return [PartSpec(dtype, (count,)) for dtype, count in numel.items()]


def vectors(items: Sequence[Parts]) -> list[Tensor]:
    """Vectors of the right dtypes and sizes, to be filled."""
    return [torch.empty(spec.shape, dtype=spec.dtype.torch, device="cpu") for spec in specs(items)]


def join(items: Sequence[tuple[Parts, Bytes]]) -> list[Tensor]:
    """The vectors of items, each given by the bytes of its parts, one after the other."""
    joined = vectors([parts for parts, _ in items])
    at = {vector.dtype: 0 for vector in joined}
    flat = {vector.dtype: vector.view(torch.uint8).numpy() for vector in joined}
    for parts, data in items:
        position = 0
        for spec in parts.values():
            piece, dtype = data[position : position + spec.nbytes], spec.dtype.torch
            flat[dtype][at[dtype] : at[dtype] + spec.nbytes] = piece
            at[dtype] += spec.nbytes
            position += spec.nbytes
    return joined


def split(items: Sequence[Parts], filled: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The parts of each item: views of the vectors."""
    at = {vector.dtype: 0 for vector in filled}
    flat = {vector.dtype: vector for vector in filled}
    by_item = []
    for parts in items:
        parts_of = {}
        for name, spec in parts.items():
            dtype = spec.dtype.torch
            start = at[dtype]
            at[dtype] = start + spec.numel
            parts_of[name] = flat[dtype][start : start + spec.numel].view(spec.shape)
        by_item.append(parts_of)
    return by_item
