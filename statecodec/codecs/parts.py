"""The parts of an encoded tensor, and what may have to be there to decode them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from statecodec.dtypes import DType

if TYPE_CHECKING:
    from torch import Tensor

Companions: TypeAlias = "Mapping[str, Tensor]"
"""Companions of a tensor: role -> the values of the same elements, in a shape of as many."""

NO_COMPANIONS: Companions = MappingProxyType({})


@dataclass(frozen=True)
class PartSpec:
    """Dtype and shape of one stored part.

    Args:
        dtype: Its dtype.
        shape: Its shape.
    """

    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes, before packing."""
        return self.numel * self.dtype.itemsize


def inner_parts(parts: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parts of a nested codec, which are stored under `prefix.`."""
    return {k.removeprefix(prefix + "."): t for k, t in parts.items() if k.startswith(prefix + ".")}
