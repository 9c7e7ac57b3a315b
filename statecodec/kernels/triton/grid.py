"""Uniform quantisation in Triton; the arithmetic is that of `reference.grid`.

Encoding kernels leave each program's error sums in a row of fp64, which the host adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec import kernels
from statecodec.kernels import grids
from statecodec.kernels.grids import Grid
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison
from statecodec.kernels.triton.companding import magnitude_bits
from statecodec.kernels.triton.runtime import OPTIONS, TILE, flag_word, on

_NAN, _INF, _NEGATIVE = (tl.constexpr(f) for f in (kernels.NAN, kernels.INF, kernels.NEGATIVE))
_LIMIT, _LARGEST_BITS, _INF_BITS = (tl.constexpr(n) for n in (grids.LIMIT, grids.LARGEST_BITS, 0x7F800000))
_LARGEST = tl.constexpr(float(torch.finfo(torch.float32).max))


@triton.jit
def number(x, per_unit, threshold):
    """Codes (int32) of fp32 `x` on a linear grid."""
    bits = magnitude_bits(x)
    near = (tl.minimum(tl.abs(x) * per_unit, _LIMIT) + 0.5).to(tl.int32)
    code = tl.where(bits < threshold, near, _LIMIT + (bits - threshold))
    return tl.where(x < 0, -code, code)


@triton.jit
def value(codes, width, threshold):
    """What any codes decode to (fp32, finite)."""
    code = tl.abs(tl.maximum(codes, -0x7FFFFFFF))
    bits = threshold + tl.minimum(tl.maximum(code - _LIMIT, 0), _LARGEST_BITS - threshold)
    magnitude = tl.where(code < _LIMIT, code.to(tl.float32) * width, bits.to(tl.float32, bitcast=True))
    return tl.where(codes < 0, -magnitude, magnitude)


@triton.jit
def raise_flags(flags_ptr, x):
    """OR what fp32 `x` holds that is not finite into the flag word."""
    bits = magnitude_bits(x)
    if tl.max(bits, axis=0) >= _INF_BITS:
        found = tl.max(tl.where(bits > _INF_BITS, _NAN, 0), axis=0)
        tl.atomic_or(flags_ptr, found | tl.max(tl.where(bits == _INF_BITS, _INF, 0), axis=0))


@triton.jit
def raise_negative(flags_ptr, x):
    """OR the flag for numbers below zero into the flag word."""
    if tl.max((x < 0).to(tl.int32), axis=0) > 0:
        tl.atomic_or(flags_ptr, _NEGATIVE)


@triton.jit
def leave_sums(sums_ptr, x, decoded):
    """This program's sum of x**2, sum of (decoded - x)**2 and largest difference, as three fp64."""
    row = sums_ptr + tl.program_id(0).to(tl.int64) * 3
    exact = x.to(tl.float64)
    difference = decoded.to(tl.float64) - exact
    tl.store(row, tl.sum(exact * exact, axis=0))
    tl.store(row + 1, tl.sum(difference * difference, axis=0))
    tl.store(row + 2, tl.max(tl.abs(decoded - x), axis=0).to(tl.float64))


@triton.jit
def _encode_uniform(
    x_ptr, codes_ptr, sums_ptr, flags_ptr, n: tl.int64, width, per_unit, threshold: tl.int64, TILE: tl.constexpr
):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
    raise_flags(flags_ptr, x)
    code = number(x, per_unit, threshold.to(tl.int32))
    tl.store(codes_ptr + offset, code, mask=offset < n)
    leave_sums(sums_ptr, x, value(code, width, threshold.to(tl.int32)))


@triton.jit
def _encode_direction(
    m_ptr, v_ptr, codes_ptr, sums_ptr, flags_ptr, n: tl.int64, eps, width, per_unit, threshold: tl.int64,
    TILE: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = tl.load(m_ptr + offset, mask=offset < n, other=0.0)
    v = tl.load(v_ptr + offset, mask=offset < n, other=0.0)
    raise_flags(flags_ptr, m)
    raise_flags(flags_ptr, v)
    raise_negative(flags_ptr, v)
    direction = tl.div_rn(m, tl.sqrt_rn(v) + eps)
    # Of finite moments only: what the moments themselves lack is already flagged.
    sound = (magnitude_bits(m) < _INF_BITS) & (magnitude_bits(v) < _INF_BITS) & (v >= 0)
    raise_flags(flags_ptr, tl.where(sound, direction, 0.0))
    code = number(direction, per_unit, threshold.to(tl.int32))
    tl.store(codes_ptr + offset, code, mask=offset < n)
    leave_sums(sums_ptr, direction, value(code, width, threshold.to(tl.int32)))


@triton.jit
def _decode_uniform(codes_ptr, out_ptr, n: tl.int64, width, threshold: tl.int64, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    code = tl.load(codes_ptr + offset, mask=offset < n, other=0)
    tl.store(out_ptr + offset, value(code, width, threshold.to(tl.int32)), mask=offset < n)


@triton.jit
def _decode_direction(codes_ptr, v_ptr, out_ptr, n: tl.int64, eps, width, threshold: tl.int64, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    code = tl.load(codes_ptr + offset, mask=offset < n, other=0)
    v = tl.load(v_ptr + offset, mask=offset < n, other=0.0)
    out = value(code, width, threshold.to(tl.int32)) * (tl.sqrt_rn(v) + eps)
    tl.store(out_ptr + offset, tl.minimum(tl.maximum(out, -_LARGEST), _LARGEST), mask=offset < n)


def programs(n: int) -> tuple[int]:
    """The launch grid over n elements."""
    return (-(-n // TILE),)


def sum_rows(like: Tensor) -> Tensor:
    """Where a launch over `like` leaves its programs' sums."""
    return torch.empty((*programs(like.numel()), 3), dtype=torch.float64, device=like.device)


def finish(flags: Tensor, sums: Tensor) -> tuple[int, Comparison]:
    """Flags and sums of a launch; waits for it."""
    found = int(flags.item())
    if found:
        return found, NO_DIFFERENCE
    sum_sq, sum_sq_diff = sums[:, :2].sum(0).tolist()
    return 0, Comparison(sum_sq, sum_sq_diff, float(sums[:, 2].max()), 0)


def encode_uniform(x: Tensor, codes: Tensor, *, grid: Grid) -> tuple[int, Comparison]:
    """See `reference.grid.encode_uniform`."""
    n = x.numel()
    with on(x):
        if not n:
            return 0, NO_DIFFERENCE
        flags, sums = flag_word(x), sum_rows(x)
        _encode_uniform[programs(n)](
            x, codes, sums, flags, n, grid.width, grid.per_unit, grid.threshold, TILE=TILE, **OPTIONS
        )
        return finish(flags, sums)


def decode_uniform(codes: Tensor, out: Tensor, *, grid: Grid) -> None:
    """See `reference.grid.decode_uniform`."""
    n = out.numel()
    with on(out):
        if n:
            _decode_uniform[programs(n)](
                codes, out, n, grid.width, grid.threshold, TILE=TILE, **OPTIONS
            )  # fmt: skip


def encode_direction(m: Tensor, v: Tensor, codes: Tensor, *, grid: Grid, eps: float) -> tuple[int, Comparison]:
    """See `reference.grid.encode_direction`."""
    n = m.numel()
    with on(m):
        if not n:
            return 0, NO_DIFFERENCE
        flags, sums = flag_word(m), sum_rows(m)
        _encode_direction[programs(n)](
            m, v, codes, sums, flags, n, eps, grid.width, grid.per_unit, grid.threshold, TILE=TILE, **OPTIONS
        )
        return finish(flags, sums)


def decode_direction(codes: Tensor, v: Tensor, out: Tensor, *, grid: Grid, eps: float) -> None:
    """See `reference.grid.decode_direction`."""
    n = out.numel()
    with on(out):
        if n:
            _decode_direction[programs(n)](codes, v, out, n, eps, grid.width, grid.threshold, TILE=TILE, **OPTIONS)
