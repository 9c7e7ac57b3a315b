"""Codes on grids in Triton (`uniform`, `direction`, `logarithmic`), and the sums from which errors are computed.

One kernel encodes and one decodes; which codec it is for is a compile-time argument. The encoder keeps sums and the
largest bits in every thread, tile after tile, and leaves them in a row of fp64 for each program, which the host adds
up: one launch and one small copy, no atomics, no barrier before a program ends. A value that is not finite
shows in the largest bits; which flags it raises is computed only then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec import kernels
from statecodec.kernels import grids
from statecodec.kernels.grids import Grid, LogGrid
from statecodec.kernels.reference import statistics as reference
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison
from statecodec.kernels.triton.companding import flags_of, log2_of_mantissa
from statecodec.kernels.triton.runtime import INTERPRETED, TILE, decode_table, on, run, to_host
from statecodec.kernels.triton.words import INF_BITS, bits, looked_up, magnitude_bits, unsigned_bits, value

_LIMIT, _LARGEST_BITS = tl.constexpr(grids.LIMIT), tl.constexpr(grids.LARGEST_BITS)
_LARGEST = tl.constexpr(float(torch.finfo(torch.float32).max))
_NORMAL_BITS, _FIRST, _RAISE = tl.constexpr(0x00800000), tl.constexpr(127 + grids.LOWEST), tl.constexpr(2.0**32)

THREADS = tl.constexpr(128)
PROGRAMS = 2 if INTERPRETED else 2048  # programs with sums: about two rounds of a large card, few enough rows to read


@dataclass(frozen=True)
class Task:
    """What a kernel is for, known when it is compiled."""

    kind: str  # uniform, direction, logarithmic; compare, which has no codes
    per_octave: int = 0  # of a logarithmic grid
    top: int = 0
    tile: int = TILE


@triton.jit
def _exact_from(width):
    """`Grid.threshold`."""
    return bits(tl.full([1], width * _LIMIT, tl.float32))


@triton.jit
def linear_code(x, width, per_unit):
    """Codes (int32) of fp32 `x` on a linear grid."""
    magnitude, exact_from = magnitude_bits(x), _exact_from(width)
    near = (tl.minimum(tl.abs(x) * per_unit, _LIMIT) + 0.5).to(tl.int32)
    code = tl.where(magnitude < exact_from, near, _LIMIT + (magnitude - exact_from))
    return tl.where(x < 0, -code, code)


@triton.jit
def linear_value(codes, width):
    """What any codes of a linear grid decode to (fp32, finite)."""
    code, exact_from = tl.abs(tl.maximum(codes, -0x7FFFFFFF)), _exact_from(width)
    exact = value(exact_from + tl.minimum(tl.maximum(code - _LIMIT, 0), _LARGEST_BITS - exact_from))
    magnitude = tl.where(code < _LIMIT, code.to(tl.float32) * width, exact)
    return tl.where(codes < 0, -magnitude, magnitude)


@triton.jit
def log_code(x, PER_OCTAVE: tl.constexpr):
    """Codes (int32) of fp32 `x` from 0 on, on a logarithmic grid."""
    subnormal = bits(x) < _NORMAL_BITS
    lifted = tl.where(subnormal, bits(x * _RAISE), bits(x))
    octave = (lifted >> 23) - _FIRST - tl.where(subnormal, 32, 0)
    code = 1 + octave * PER_OCTAVE + (log2_of_mantissa(lifted) * PER_OCTAVE + 0.5).to(tl.int32)
    return tl.where(x > 0, code, 0)


@triton.jit
def log_value(codes, table_ptr, TOP: tl.constexpr):
    """What any codes of a logarithmic grid decode to."""
    return looked_up(table_ptr, tl.minimum(tl.maximum(codes, 0), TOP))


@triton.jit
def _largest(x, SIDE: tl.constexpr):
    """The largest of a tile, thread by thread."""
    return tl.max(tl.reshape(tl.max(x, axis=0), [THREADS, SIDE]), axis=1)


@triton.jit
def _total(x, SIDE: tl.constexpr):
    """The sum of a tile's squares in fp64, thread by thread."""
    return tl.sum(tl.reshape(tl.sum(x * x, axis=0), [THREADS, SIDE]), axis=1)


@triton.jit
def _encode(x_ptr, other_ptr, codes_ptr, sums_ptr, n: tl.int64, grid, eps, TASK: tl.constexpr):
    """Codes, and sums over x**2 and (decoded - x)**2. `other`: v, what is compared with, or a grid's table."""
    KIND: tl.constexpr = TASK.kind
    SIDE: tl.constexpr = 128 // codes_ptr.dtype.element_ty.primitive_bitwidth
    width, per_unit = grid
    sum_sq, sum_sq_diff = tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float64)
    furthest, top = tl.zeros([THREADS], tl.float32), tl.zeros([THREADS], tl.uint32)
    # The SIDE neighbours that a wide store takes, and all rounds of them, lie in one thread.
    lanes: tl.constexpr = THREADS * SIDE
    within = tl.arange(0, TASK.tile // lanes)[:, None] * lanes + tl.arange(0, lanes)[None, :]
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, TASK.tile), tl.num_programs(0)):
        offset = tile * TASK.tile + within
        x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
        if KIND == "direction" or KIND == "compare":
            other = tl.load(other_ptr + offset, mask=offset < n, other=0.0)
        if KIND == "compare":
            decoded = other
        elif KIND == "logarithmic":
            code = log_code(x, TASK.per_octave)
            decoded = log_value(code, other_ptr, TASK.top)
        else:
            if KIND == "direction":
                x = tl.div_rn(x, tl.sqrt_rn(other) + eps)
            code = linear_code(x, width, per_unit)
            decoded = linear_value(code, width)
        if KIND != "compare":
            tl.store(codes_ptr + offset, code.to(codes_ptr.dtype.element_ty), mask=offset < n)
        exact = x.to(tl.float64)
        difference = decoded.to(tl.float64) - exact
        sum_sq += _total(exact, SIDE)
        sum_sq_diff += _total(difference, SIDE)
        furthest = tl.maximum(furthest, _largest(tl.abs(decoded - x), SIDE))
        if KIND == "logarithmic":
            highest = unsigned_bits(x)
        else:
            highest = magnitude_bits(x).to(tl.uint32, bitcast=True)
        if KIND == "direction":  # a moment that is not finite shows in the direction, except an infinite v
            highest = tl.maximum(highest, unsigned_bits(other))
        if KIND == "compare":
            highest = tl.maximum(highest, magnitude_bits(other).to(tl.uint32, bitcast=True))
        top = tl.maximum(top, _largest(highest, SIDE))
    row = sums_ptr + tl.program_id(0).to(tl.int64) * 4
    tl.store(row, tl.sum(sum_sq, axis=0))
    tl.store(row + 1, tl.sum(sum_sq_diff, axis=0))
    tl.store(row + 2, tl.max(furthest, axis=0).to(tl.float64))
    tl.store(row + 3, tl.max(top, axis=0).to(tl.float64))


@triton.jit
def _decode(codes_ptr, other_ptr, out_ptr, n: tl.int64, width, eps, TASK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TASK.tile + tl.arange(0, TASK.tile)
    code = tl.load(codes_ptr + offset, mask=offset < n, other=0).to(tl.int32)
    if TASK.kind == "logarithmic":
        out = log_value(code, other_ptr, TASK.top)
    else:
        out = linear_value(code, width)
        if TASK.kind == "direction":
            v = tl.load(other_ptr + offset, mask=offset < n, other=0.0)
            out = tl.minimum(tl.maximum(out * (tl.sqrt_rn(v) + eps), -_LARGEST), _LARGEST)
    tl.store(out_ptr + offset, out, mask=offset < n)


def encode_uniform(x: Tensor, codes: Tensor, *, grid: Grid) -> tuple[int, Comparison]:
    """See `reference.grid.encode_uniform`."""
    sums = _measure(Task("uniform"), x, x, codes, grid)
    return (0, sums) if sums else (flags_of(x, signed=True), NO_DIFFERENCE)


def encode_direction(m: Tensor, v: Tensor, codes: Tensor, *, grid: Grid, eps: float) -> tuple[int, Comparison]:
    """See `reference.grid.encode_direction`."""
    if sums := _measure(Task("direction"), m, v, codes, grid, eps):
        return 0, sums
    flags = flags_of(m, signed=True) | flags_of(v, signed=False)
    return flags or kernels.INF, NO_DIFFERENCE  # finite moments whose ratio is not


def encode_logarithmic(x: Tensor, codes: Tensor, *, grid: LogGrid) -> tuple[int, Comparison]:
    """See `reference.logarithm.encode_logarithmic`."""
    sums = _measure(_logarithmic(grid), x, decode_table(grid, x.device), codes)
    return (0, sums) if sums else (flags_of(x, signed=False), NO_DIFFERENCE)


def compare(a: Tensor, b: Tensor) -> Comparison:
    """See `reference.statistics.compare`; finite fp32 runs here, all else there."""
    plain = a.dtype == torch.float32 or not a.numel()
    return (_measure(Task("compare"), a, b, a) if plain else None) or reference.compare(a, b)


def decode_uniform(codes: Tensor, out: Tensor, *, grid: Grid) -> None:
    """See `reference.grid.decode_uniform`."""
    _fill(Task("uniform"), codes, out, out, grid.width)


def decode_direction(codes: Tensor, v: Tensor, out: Tensor, *, grid: Grid, eps: float) -> None:
    """See `reference.grid.decode_direction`."""
    _fill(Task("direction"), codes, v, out, grid.width, eps)


def decode_logarithmic(codes: Tensor, out: Tensor, *, grid: LogGrid) -> None:
    """See `reference.logarithm.decode_logarithmic`."""
    _fill(_logarithmic(grid), codes, decode_table(grid, out.device), out)


def _measure(
    task: Task, x: Tensor, other: Tensor, codes: Tensor, grid: Grid | None = None, eps: float = 0.0
) -> Comparison | None:
    """Launch `_encode`; its sums, or None if it found what is not finite, or below 0 where that may not be."""
    n = x.numel()
    with on(x):
        if not n:
            return NO_DIFFERENCE
        sums = torch.empty(min(PROGRAMS, -(-n // TILE)), 4, dtype=torch.float64, device=x.device)
        linear = (grid.width, grid.per_unit) if grid else (0.0, 0.0)
        run(_encode, len(sums), x, other, codes, sums, n, linear, eps, TASK=task)
        totals = to_host(sums)
    if totals[:, 3].max() >= INF_BITS.value:
        return None
    return Comparison(float(totals[:, 0].sum()), float(totals[:, 1].sum()), float(totals[:, 2].max()), 0)


def _fill(task: Task, codes: Tensor, other: Tensor, out: Tensor, width: float = 0.0, eps: float = 0.0) -> None:
    """Launch `_decode`."""
    run(_decode, -(-out.numel() // TILE), codes, other, out, out.numel(), width, eps, TASK=task)


def _logarithmic(grid: LogGrid) -> Task:
    return Task("logarithmic", grid.per_octave, grid.top)
