"""A first moment as the direction in which Adam would move: its error is a fraction of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from statecodec import kernels
from statecodec.codecs.fp32 import fp32_like, rounding, store
from statecodec.codecs.on_grid import OnGrid, grid_bound
from statecodec.codecs.parts import NO_COMPANIONS, Companions
from statecodec.elementwise import as_fp32
from statecodec.kernels.grids import MIN_STEP
from statecodec.kernels.reference.statistics import Comparison
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Direction(OnGrid):
    """The direction u = exp_avg / (sqrt(exp_avg_sq) + eps) on a uniform grid: part `codes` (int32).

    Encoding divides by the true root, decoding multiplies by the root of the exp_avg_sq that the reader has. So the
    error of u is that of rounding, rms step / sqrt(12), whatever exp_avg_sq was stored with; the decoded exp_avg is off
    by the relative error of the root as well.

    Adam's bias corrections are part of the fields. With c1 = 1 - beta1**t and c2 = 1 - beta2**t, the fields for an
    error of a fraction f of an update whose rms is U are step = f * U * sqrt(12) * c1 / sqrt(c2) and eps = Adam's eps *
    sqrt(c2). Directions of 2**22 cells and more are exact, as in `uniform`: where exp_avg_sq is 0 and exp_avg is not,
    eps alone is the divisor.

    NaN, infinities and negative second moments are refused. The error sums that encoding returns are those of u.

    Args:
        step: Width of the grid, in units of u.
        eps: What is added to the root.

    Example:
        >>> import torch
        >>> m, v = torch.tensor([0.1, -0.2]), torch.tensor([0.01, 0.04])
        >>> encoded = Direction(step=0.01).encode(m, companions={"exp_avg_sq": v})
        >>> encoded.parts["codes"], encoded.decode(companions={"exp_avg_sq": v})
        (tensor([ 100, -100], dtype=torch.int32), tensor([ 0.1000, -0.2000]))
    """

    name: ClassVar[str] = "direction"
    needs: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    step: float = 0.01
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(MIN_STEP <= self.eps <= 1.0, f"eps={self.eps!r}, expected {MIN_STEP} to 1")

    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> Comparison | None:
        v, codes = self.companion(companions, x), parts["codes"].view(-1)
        flags, sums = backend.encode_direction(as_fp32(x).view(-1), v, codes, grid=self.grid, eps=self.eps)
        self.refuse(flags)
        return sums if x.dtype == torch.float32 else None

    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        v, values = self.companion(companions, out), fp32_like(out)
        backend.decode_direction(parts["codes"].view(-1), v, values.view(-1), grid=self.grid, eps=self.eps)
        store(values, out)

    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        divisor = self.companion(companions, x).to(torch.float64).sqrt().view(x.shape) + self.eps
        direction = x.to(torch.float64) / divisor
        bound = grid_bound(direction, self.grid) + direction.abs() * 2.0**-21  # the root's and both products' rounding
        return rounding(bound * divisor, x)
