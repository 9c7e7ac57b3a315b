"""Tensors of the original that are stored in several items, such as the chunks of a sharded checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from statecodec.dtypes import TORCH, DType
from statecodec.errors import FormatError
from statecodec.layouts import Box, Run
from statecodec.layouts.parts import are_whole
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Shaped(Protocol):
    """An item with a shape and a dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType: ...


@dataclass(frozen=True)
class NamedTensor:
    """A tensor that is stored in several items, under the name that rules and reports give it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, Box | Run], ...]
    """Index of the item, and the part of the tensor that it holds."""

    def assembled(self, decode: Callable[[int], Tensor]) -> Tensor:
        """Put the tensor together; `decode` gives an item by its index."""
        whole = torch.empty(self.shape, dtype=self.dtype.torch, device="cpu")
        for index, part in self.pieces:
            values = decode(index).reshape(-1).view(torch.uint8).view(self.dtype.torch)
            if isinstance(part, Run):
                whole.view(-1)[part.start : part.stop] = values
            else:
                box = tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))
                whole[box] = values.view(part.shape)
        return whole


def to_json(joined: Sequence[NamedTensor]) -> list[list[Any]]:
    """Rows of name, dtype, shape and pieces; a piece is its item, then a box's corner and sizes, or a run's ends."""
    return [[t.name, t.dtype.name, list(t.shape), [[i, *_ends(part)] for i, part in t.pieces]] for t in joined]


def from_json(value: Any, items: Sequence[Shaped]) -> tuple[NamedTensor, ...]:
    """The inverse of `to_json`, checked. Raises FormatError.

    The parts must be all of the tensor, once, and each as large as its item. So no tensor is larger than what is
    stored, and no item is in two.
    """
    if not isinstance(value, list):
        raise FormatError("the document's tensors are not a list")
    tensors = tuple(_joined(row, items) for row in value)
    used = [index for tensor in tensors for index, _ in tensor.pieces]
    if len(set(used)) != len(used) or len({tensor.name for tensor in tensors}) != len(tensors):
        raise FormatError("the document puts an item into two tensors, or names a tensor twice")
    return tensors


def _joined(row: Any, items: Sequence[Shaped]) -> NamedTensor:
    if not isinstance(row, list) or len(row) != 4 or not isinstance(row[0], str) or row[1] not in list(TORCH):
        raise FormatError(f"a tensor of the document is not name, dtype, shape and pieces: {str(row)[:80]}")
    name, dtype, shape = row[0], TORCH[row[1]], _sizes(row[2])
    if not isinstance(row[3], list) or not all(isinstance(p, list) and len(p) == 3 for p in row[3]):
        raise FormatError(f"the pieces of {name[:80]!r} are not items and parts")
    pieces = [(_size(p[0], len(items) - 1), _part(p[1], p[2])) for p in row[3]]
    boxes = [part for _, part in pieces if isinstance(part, Box)]
    runs = [part for _, part in pieces if isinstance(part, Run)]
    if not pieces or (boxes and runs) or not are_whole(shape, boxes or runs):
        raise FormatError(f"the pieces of {name[:80]!r} are not the whole of it, once")
    for index, part in pieces:
        numel = math.prod(part.shape) if isinstance(part, Box) else part.stop - part.start
        if numel * dtype.itemsize != math.prod(items[index].shape) * items[index].dtype.itemsize:
            raise FormatError(f"a piece of {name[:80]!r} has another size than the item that it is stored as")
    return NamedTensor(name, dtype, shape, tuple(pieces))


def _ends(part: Box | Run) -> tuple[Any, Any]:
    return (list(part.offset), list(part.shape)) if isinstance(part, Box) else (part.start, part.stop)


def _part(first: Any, second: Any) -> Box | Run:
    return Box(_sizes(first), _sizes(second)) if isinstance(first, list) else Run(_size(first), _size(second))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 64:
        raise FormatError(f"{str(value)[:80]} in the document is not a shape")
    return tuple(map(_size, value))


def _size(value: Any, most: int = 1 << 62) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise FormatError(f"{str(value)[:40]!r} in the document is not a size, or not the number of an item")
    return value
