"""Log codes of non-negative values on one global grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from statecodec.kernels import INF, NAN, NEGATIVE
from statecodec.kernels.curves import LOG2
from statecodec.kernels.grids import LOWEST, LogGrid
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison, compare
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def encode_logarithmic(x: Tensor, codes: Tensor, *, grid: LogGrid) -> tuple[int, Comparison]:
    """Number values that are not negative on a logarithmic grid.

    Args:
        x: fp32, flat.
        codes: Written: int16, flat; 0 for zeros, at least 1 for anything positive.
        grid: The grid.

    Returns:
        The flags NAN | INF | NEGATIVE of what could not be encoded, and the sums of x against what its codes decode to.
    """
    flags = NAN * bool(x.isnan().any()) | INF * bool(x.isinf().any()) | NEGATIVE * bool((x < 0).any())
    if flags or not x.numel():
        return flags, NO_DIFFERENCE
    subnormal = (x > 0) & (x < 2.0**-126)
    bits = torch.where(subnormal, x * 2.0**32, x).view(torch.int32)  # exact
    exponent = (bits >> 23).to(torch.int64) - 127 - torch.where(subnormal, 32, 0)
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1.0
    c0, c1, c2, c3 = LOG2
    log2 = fraction * (c0 + fraction * (c1 + fraction * (c2 + fraction * c3)))
    within = (log2 * float(grid.per_octave) + 0.5).floor().to(torch.int64)
    code = 1 + (exponent - LOWEST) * grid.per_octave + within
    codes.copy_(torch.where(x > 0, code, torch.zeros_like(code)).to(torch.int16))
    return 0, compare(x, _values(codes, grid))


def decode_logarithmic(codes: Tensor, out: Tensor, *, grid: LogGrid) -> None:
    """The inverse of `encode_logarithmic`: one table look-up per element.

    Args:
        codes: int16, flat; those outside the grid decode as its ends.
        out: Written: fp32, flat.
        grid: The grid.
    """
    out.copy_(_values(codes, grid))


def _values(codes: Tensor, grid: LogGrid) -> Tensor:
    table = torch.from_numpy(grid.table).to(codes.device)
    return table[codes.to(torch.int64).clamp(0, grid.top)]
