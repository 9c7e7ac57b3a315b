"""What codecs that round to a linear grid have in common: a step, one part of codes, the bound on the error."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from statecodec.codecs.base import Codec
from statecodec.codecs.parts import PartSpec
from statecodec.dtypes import INT32, DType
from statecodec.kernels.grids import LIMIT, MAX_STEP, MIN_STEP, Grid
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OnGrid(Codec):
    """A codec of integer codes on a linear grid: part `codes` (int32), one for each value.

    Args:
        step: The width of the grid, from 2**-126 to 2**100; in which units, each codec says.
    """

    step: float = 1.0

    def __post_init__(self) -> None:
        self.require(MIN_STEP <= self.step <= MAX_STEP, f"step={self.step!r}, expected {MIN_STEP} to {MAX_STEP}")

    @cached_property
    def grid(self) -> Grid:
        """The grid as the kernels take it."""
        return Grid(self.step)

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        self.require_float(dtype)
        return {"codes": PartSpec(INT32, shape)}


def grid_bound(x: Tensor, grid: Grid) -> Tensor:
    """Bound on the error of fp32 values (float64) on a linear grid: half a step, and the rounding of the arithmetic."""
    size = x.abs()
    bound = 0.5 * grid.width + size * 2.0**-22
    return torch.where((size == 0) | (size > grid.width * LIMIT), torch.zeros_like(size), bound)
