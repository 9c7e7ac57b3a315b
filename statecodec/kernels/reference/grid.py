"""Uniform quantisation of values, and of first moments in units of the root of their second moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from statecodec.kernels import INF, NAN, NEGATIVE
from statecodec.kernels.grids import LARGEST_BITS, LIMIT, Grid
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison, compare
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def encode_uniform(x: Tensor, codes: Tensor, *, grid: Grid) -> tuple[int, Comparison]:
    """Number `x` (fp32, flat) on the grid: `codes` (int32, flat) are the multiples, with x's sign; 0 only near zero.

    Returns the flags NAN | INF of what could not be encoded, and the sums of x against what its codes decode to.
    """
    flags = _nonfinite(x)
    if flags or not x.numel():
        return flags, NO_DIFFERENCE
    magnitude = x.abs()
    bits = magnitude.view(torch.int32).to(torch.int64)
    near = ((magnitude * grid.per_unit).clamp(max=LIMIT) + 0.5).floor().to(torch.int64)
    number = torch.where(bits < grid.threshold, near, LIMIT + bits - grid.threshold)
    codes.copy_(torch.where(x < 0, -number, number).to(torch.int32))
    return 0, compare(x, _values(codes, grid))


def decode_uniform(codes: Tensor, out: Tensor, *, grid: Grid) -> None:
    """The inverse: one fp32 multiplication per element, or the element's own bits. Any codes give finite values."""
    out.copy_(_values(codes, grid))


def encode_direction(m: Tensor, v: Tensor, codes: Tensor, *, grid: Grid, eps: float) -> tuple[int, Comparison]:
    """Number u = m / (sqrt(v) + eps) on the grid (fp32, flat; `eps` as rounded to fp32).

    Returns the flags NAN | INF | NEGATIVE of what could not be encoded, and the sums of u against what its codes
    decode to.
    """
    flags = _nonfinite(m) | _nonfinite(v) | NEGATIVE * bool((v < 0).any())
    if flags or not m.numel():
        return flags, NO_DIFFERENCE
    return encode_uniform(m / _divisor(v, eps), codes, grid=grid)


def decode_direction(codes: Tensor, v: Tensor, out: Tensor, *, grid: Grid, eps: float) -> None:
    """The inverse, with the `v` that the reader has: out = value * (sqrt(v) + eps), kept finite."""
    largest = torch.finfo(torch.float32).max
    out.copy_((_values(codes, grid) * _divisor(v, eps)).clamp_(-largest, largest))


def _values(codes: Tensor, grid: Grid) -> Tensor:
    number = codes.to(torch.int64).abs()
    near = number.to(torch.float32) * grid.width
    bits = (number - LIMIT + grid.threshold).clamp(0, LARGEST_BITS).to(torch.int32)
    magnitude = torch.where(number < LIMIT, near, bits.view(torch.float32))
    return torch.where(codes < 0, -magnitude, magnitude)


def _divisor(v: Tensor, eps: float) -> Tensor:
    # By way of fp64, because torch's fp32 root is not correctly rounded on CPUs.
    return v.to(torch.float64).sqrt().to(torch.float32) + torch.tensor(eps, dtype=torch.float32, device=v.device)


def _nonfinite(x: Tensor) -> int:
    return NAN * bool(x.isnan().any()) | INF * bool(x.isinf().any())
