"""Uniform quantisation in Triton; the arithmetic is that of `reference.grid`.

Encoding kernels keep sums and the largest bits in every thread, tile after tile, and leave them in a row of fp64 for
each program, which the host adds up: one launch and one small copy, no atomics, no barrier before a program ends. What
is not finite shows in the largest bits; which flags it raises is looked at only then.
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
from statecodec.kernels.triton.companding import flags_of, magnitude_bits, unsigned_bits
from statecodec.kernels.triton.runtime import INTERPRETED, OPTIONS, TILE, on, to_host

_LIMIT, _LARGEST_BITS, _INF_BITS = (tl.constexpr(n) for n in (grids.LIMIT, grids.LARGEST_BITS, 0x7F800000))
_LARGEST = tl.constexpr(float(torch.finfo(torch.float32).max))

THREADS = tl.constexpr(128)
SIDE = 4  # neighbours in a thread: 16 bytes of fp32
PROGRAMS = 2 if INTERPRETED else 2048  # that leave sums: about two rounds of a large card, few enough rows to read


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
def tile_of(tile, TILE: tl.constexpr, SIDE: tl.constexpr):
    """A tile's offsets as [rounds, lanes]: the SIDE neighbours that a wide store takes, and all rounds of them, lie in
    one thread.
    """
    lanes: tl.constexpr = THREADS * SIDE
    return tile * TILE + tl.arange(0, TILE // lanes)[:, None] * lanes + tl.arange(0, lanes)[None, :]


@triton.jit
def no_sums():
    """What `add_sums` starts from, thread by thread."""
    return tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float32)


@triton.jit
def add_sums(sum_sq, sum_sq_diff, furthest, x, decoded, SIDE: tl.constexpr):
    """Add a tile's x**2 and (decoded - x)**2, and keep the largest difference."""
    exact = x.to(tl.float64)
    difference = decoded.to(tl.float64) - exact
    sum_sq += tl.sum(tl.reshape(tl.sum(exact * exact, axis=0), [THREADS, SIDE]), axis=1)
    sum_sq_diff += tl.sum(tl.reshape(tl.sum(difference * difference, axis=0), [THREADS, SIDE]), axis=1)
    return sum_sq, sum_sq_diff, tl.maximum(furthest, largest(tl.abs(decoded - x), SIDE))


@triton.jit
def largest(x, SIDE: tl.constexpr):
    """The largest of a tile, thread by thread."""
    return tl.max(tl.reshape(tl.max(x, axis=0), [THREADS, SIDE]), axis=1)


@triton.jit
def leave_sums(sums_ptr, sum_sq, sum_sq_diff, furthest, top):
    """This program's row of four fp64: the sums over its threads, the largest difference, the largest bits."""
    row = sums_ptr + tl.program_id(0).to(tl.int64) * 4
    tl.store(row, tl.sum(sum_sq, axis=0))
    tl.store(row + 1, tl.sum(sum_sq_diff, axis=0))
    tl.store(row + 2, tl.max(furthest, axis=0).to(tl.float64))
    tl.store(row + 3, tl.max(top, axis=0).to(tl.float64))


@triton.jit
def _encode_uniform(
    x_ptr, codes_ptr, sums_ptr, n: tl.int64, width, per_unit, threshold: tl.int64, TILE: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    sum_sq, sum_sq_diff, furthest = no_sums()
    top = tl.zeros([THREADS], tl.int32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, TILE), tl.num_programs(0)):
        offset = tile_of(tile, TILE, SIDE)
        x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
        code = number(x, per_unit, threshold.to(tl.int32))
        tl.store(codes_ptr + offset, code, mask=offset < n)
        decoded = value(code, width, threshold.to(tl.int32))
        sum_sq, sum_sq_diff, furthest = add_sums(sum_sq, sum_sq_diff, furthest, x, decoded, SIDE)
        top = tl.maximum(top, largest(magnitude_bits(x), SIDE))
    leave_sums(sums_ptr, sum_sq, sum_sq_diff, furthest, top)


@triton.jit
def _encode_direction(
    m_ptr, v_ptr, codes_ptr, sums_ptr, n: tl.int64, eps, width, per_unit, threshold: tl.int64, TILE: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    sum_sq, sum_sq_diff, furthest = no_sums()
    top = tl.zeros([THREADS], tl.uint32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, TILE), tl.num_programs(0)):
        offset = tile_of(tile, TILE, SIDE)
        m = tl.load(m_ptr + offset, mask=offset < n, other=0.0)
        v = tl.load(v_ptr + offset, mask=offset < n, other=0.0)
        direction = tl.div_rn(m, tl.sqrt_rn(v) + eps)
        code = number(direction, per_unit, threshold.to(tl.int32))
        tl.store(codes_ptr + offset, code, mask=offset < n)
        decoded = value(code, width, threshold.to(tl.int32))
        sum_sq, sum_sq_diff, furthest = add_sums(sum_sq, sum_sq_diff, furthest, direction, decoded, SIDE)
        # A moment that is not finite shows in the direction, except an infinite v.
        found = tl.maximum(magnitude_bits(direction).to(tl.uint32, bitcast=True), unsigned_bits(v))
        top = tl.maximum(top, largest(found, SIDE))
    leave_sums(sums_ptr, sum_sq, sum_sq_diff, furthest, top)


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


def tiles(n: int) -> tuple[int]:
    """The launch grid over n elements, a tile for a program."""
    return (-(-n // TILE),)


def programs(n: int) -> tuple[int]:
    """The launch grid over n elements where programs take tile after tile."""
    return (min(PROGRAMS, *tiles(n)),)


def sum_rows(like: Tensor) -> Tensor:
    """Where a launch over `like` leaves its programs' sums."""
    return torch.empty((*programs(like.numel()), 4), dtype=torch.float64, device=like.device)


def finish(sums: Tensor) -> Comparison | None:
    """The sums of a launch, once it is done; None if it found what is not finite, or below 0 where that may not be."""
    found = to_host(sums)
    if found[:, 3].max() >= _INF_BITS.value:
        return None
    return Comparison(float(found[:, 0].sum()), float(found[:, 1].sum()), float(found[:, 2].max()), 0)


def encode_uniform(x: Tensor, codes: Tensor, *, grid: Grid) -> tuple[int, Comparison]:
    """See `reference.grid.encode_uniform`."""
    n = x.numel()
    with on(x):
        if not n:
            return 0, NO_DIFFERENCE
        sums = sum_rows(x)
        _encode_uniform[programs(n)](
            x, codes, sums, n, grid.width, grid.per_unit, grid.threshold, TILE=TILE, SIDE=SIDE, **OPTIONS
        )
        made = finish(sums)
        return (0, made) if made else (flags_of(x, signed=True), NO_DIFFERENCE)


def decode_uniform(codes: Tensor, out: Tensor, *, grid: Grid) -> None:
    """See `reference.grid.decode_uniform`."""
    n = out.numel()
    with on(out):
        if n:
            _decode_uniform[tiles(n)](
                codes, out, n, grid.width, grid.threshold, TILE=TILE, **OPTIONS
            )  # fmt: skip


def encode_direction(m: Tensor, v: Tensor, codes: Tensor, *, grid: Grid, eps: float) -> tuple[int, Comparison]:
    """See `reference.grid.encode_direction`."""
    n = m.numel()
    with on(m):
        if not n:
            return 0, NO_DIFFERENCE
        sums = sum_rows(m)
        _encode_direction[programs(n)](
            m, v, codes, sums, n, eps, grid.width, grid.per_unit, grid.threshold, TILE=TILE, SIDE=SIDE, **OPTIONS
        )
        made = finish(sums)
        if made:
            return 0, made
        flags = flags_of(m, signed=True) | flags_of(v, signed=False)
        return flags or kernels.INF, NO_DIFFERENCE  # finite moments whose ratio is not


def decode_direction(codes: Tensor, v: Tensor, out: Tensor, *, grid: Grid, eps: float) -> None:
    """See `reference.grid.decode_direction`."""
    n = out.numel()
    with on(out):
        if n:
            _decode_direction[tiles(n)](codes, v, out, n, eps, grid.width, grid.threshold, TILE=TILE, **OPTIONS)
