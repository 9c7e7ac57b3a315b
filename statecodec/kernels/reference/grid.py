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
    """Number values on a uniform grid.

    Args:
        x: fp32, flat.
        codes: Written: int32, flat: the multiples, with x's sign; 0 only near zero.
        grid: The grid.

    Returns:
        The flags NAN | INF of what could not be encoded, and the sums of x against what its codes decode to.
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
    """The inverse of `encode_uniform`: one fp32 multiplication per element, or the element's own bits.

    Args:
        codes: int32, flat. Any codes give finite values.
        out: Written: fp32, flat.
        grid: The grid.
    """
    out.copy_(_values(codes, grid))


def encode_direction(m: Tensor, v: Tensor, codes: Tensor, *, grid: Grid, eps: float) -> tuple[int, Comparison]:
    """Number u = m / (sqrt(v) + eps) on a uniform grid.

    Args:
        m: First moment: fp32, flat.
        v: Second moment of the same elements: fp32, flat.
        codes: Written: int32, flat.
        grid: The grid, in units of u.
        eps: What is added to the root, rounded to fp32.

    Returns:
        The flags NAN | INF | NEGATIVE of what could not be encoded, and the sums of u against what its codes decode to.
    """
    flags = _nonfinite(m) | _nonfinite(v) | NEGATIVE * bool((v < 0).any())
    if flags or not m.numel():
        return flags, NO_DIFFERENCE
    return encode_uniform(m / _divisor(v, eps), codes, grid=grid)


def decode_direction(codes: Tensor, v: Tensor, out: Tensor, *, grid: Grid, eps: float) -> None:
    """The inverse of `encode_direction`, with the second moment that the reader has: value * (sqrt(v) + eps).

    Args:
        codes: int32, flat.
        v: Second moment: fp32, flat.
        out: Written: the first moment, fp32, flat, kept finite.
        grid: The grid, in units of u.
        eps: As when encoding.
    """
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
