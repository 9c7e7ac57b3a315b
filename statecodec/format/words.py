"""Parts as packing sees them: the words of their memory, as numpy arrays.

A chunk's parts are looked at dozens of times while they are packed. A view of a numpy array costs a fraction of what
one of a tensor does, and does not let go of Python's lock, for which other threads would then have to be asked.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statecodec import dtypes
from statecodec.codecs import PartSpec
from statecodec.dtypes import INT16, INT32, DType
from statecodec.kernels.reference.planes import SIGNED, plane_layout
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 64  # codes; fewer are planes


class Planes(NamedTuple):
    """What a record's table depends on."""

    width: int
    """How many there are: the bytes of a word."""
    nbytes: int
    codes: bool
    """Integer codes, which may be stored narrowed or predicted."""

    @classmethod
    def of(cls, spec: PartSpec) -> Planes:
        """Of a part that is described."""
        return cls(plane_layout(spec.dtype)[0], spec.nbytes, _is_codes(spec.dtype) and spec.numel >= SMALLEST)


class Words(NamedTuple):
    """The memory of a part.

    Args:
        array: Its words, flat: as wide as it has planes; signed if they are codes of 16 or 32 bits, else unsigned.
        shape: The part's shape.
        rotate: Whether words are rotated left by one bit before they are cut into planes.
    """

    array: NDArray[Any]
    shape: tuple[int, ...]
    rotate: bool = False

    @property
    def planes(self) -> Planes:
        """How it is cut."""
        array = self.array
        return Planes(array.itemsize, array.nbytes, array.dtype.kind == "i" and array.size >= SMALLEST)

    @property
    def unsigned(self) -> NDArray[Any]:
        """The words as unsigned numbers."""
        return self.array.view(_UNSIGNED[self.array.itemsize])

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a plane, along the last dimension (a complex element is two words of a row)."""
        shape, n = self.shape, self.array.size
        cols = shape[-1] if shape else 1
        if len(shape) < 2 or not cols:
            return 1, n
        rows = 1
        for length in shape[:-1]:
            rows *= length
        rows = max(rows, 1)
        return rows, n // rows


def words_of(tensor: Tensor) -> Words:
    """The memory of a contiguous CPU tensor."""
    rotate, kind, unsigned = _memory(tensor.dtype)
    array = tensor.view(-1).view(kind).numpy()
    return Words(array if unsigned is None else array.view(unsigned), tuple(tensor.shape), rotate)


def flat(array: NDArray[Any]) -> Words:
    """A vector of integers."""
    return Words(array, array.shape)


_UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _is_codes(dtype: DType) -> bool:
    return dtype in (INT16, INT32)


@cache
def _memory(dtype: torch.dtype) -> tuple[bool, torch.dtype, Any]:
    """Whether words are rotated, torch's integers of their width, numpy's (None: the same)."""
    width, rotate = plane_layout(dtype)
    return rotate, SIGNED[width].torch, None if _is_codes(dtypes.of(dtype)) else _UNSIGNED[width]
