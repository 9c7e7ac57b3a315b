"""A uniform grid: the best quantiser before an entropy coder, with an error that is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from statecodec import kernels
from statecodec.codecs.fp32 import fp32_like, rounding, store
from statecodec.codecs.on_grid import OnGrid, grid_bound
from statecodec.codecs.parts import NO_COMPANIONS, Companions
from statecodec.elementwise import as_fp32
from statecodec.kernels.reference.statistics import Comparison
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Uniform(OnGrid):
    """How many times `step` each value is, rounded to nearest: part `codes` (int32).

    The rms error is step / sqrt(12). Values of 2**22 cells and more are exact: there the codes go on with fp32's own
    numbers (`statecodec.kernels.grids`). Zeros decode to zeros, -0.0 to 0.0. NaN and infinities are refused. Small
    codes pack: of their four bytes one is noise, one packs, and two are almost all equal (docs/format.md, section 5.1).

    Args:
        step: The width of the grid, in units of the values, from 2**-126 to 2**100.

    Example:
        >>> import torch
        >>> Uniform(step=0.5).encode(torch.tensor([0.1, 0.9, -2.0])).parts["codes"]
        tensor([ 0,  2, -4], dtype=torch.int32)
    """

    name: ClassVar[str] = "uniform"

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> Comparison | None:
        flags, sums = backend.encode_uniform(as_fp32(x).view(-1), parts["codes"].view(-1), grid=self.grid)
        self.refuse(flags)
        return sums if x.dtype == torch.float32 else None

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        values = fp32_like(out)
        backend.decode_uniform(parts["codes"].view(-1), values.view(-1), grid=self.grid)
        store(values, out)

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        return rounding(grid_bound(x.to(torch.float64), self.grid), x)
