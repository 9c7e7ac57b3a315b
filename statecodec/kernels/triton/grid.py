"""Codes on grids in Triton (`uniform`, `direction`, `logarithmic`), and the sums from which errors are computed.

One kernel encodes and one decodes; which codec it is for is a compile-time argument. The encoder keeps sums and the
largest bits in every thread, tile after tile, and leaves them in a row of fp64 for each program, which the host adds
up: one launch and one small copy, no atomics, no barrier before a program ends. A value that is not finite
shows in the largest bits; which flags it raises is computed only then.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec import kernels
from statecodec.kernels import grids
from statecodec.kernels.grids import Grid, LogGrid
from statecodec.kernels.reference import statistics as reference
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison
from statecodec.kernels.triton.companding import flags_of, log2_of_mantissa, magnitude_bits, unsigned_bits
from statecodec.kernels.triton.runtime import INTERPRETED, TILE, on, run, to_host
from statecodec.kernels.triton.words import looked_up

_LIMIT, _LARGEST_BITS, _INF_BITS = (tl.constexpr(n) for n in (grids.LIMIT, grids.LARGEST_BITS, 0x7F800000))
_LARGEST = tl.constexpr(float(torch.finfo(torch.float32).max))
_NORMAL_BITS, _FIRST, _RAISE = tl.constexpr(0x00800000), tl.constexpr(127 + grids.LOWEST), tl.constexpr(2.0**32)

THREADS = tl.constexpr(128)
PROGRAMS = 2 if INTERPRETED else 2048  # programs with sums: about two rounds of a large card, few enough rows to read


@triton.jit
def number(x, per_unit, threshold):
    """Codes (int32) of fp32 `x` on a linear grid."""
    bits = magnitude_bits(x)
    near = (tl.minimum(tl.abs(x) * per_unit, _LIMIT) + 0.5).to(tl.int32)
    code = tl.where(bits < threshold, near, _LIMIT + (bits - threshold))
    return tl.where(x < 0, -code, code)


@triton.jit
def value(codes, width, threshold):
    """What any codes of a linear grid decode to (fp32, finite)."""
    code = tl.abs(tl.maximum(codes, -0x7FFFFFFF))
    bits = threshold + tl.minimum(tl.maximum(code - _LIMIT, 0), _LARGEST_BITS - threshold)
    magnitude = tl.where(code < _LIMIT, code.to(tl.float32) * width, bits.to(tl.float32, bitcast=True))
    return tl.where(codes < 0, -magnitude, magnitude)


@triton.jit
def log_number(x, PER_OCTAVE: tl.constexpr):
    """Codes (int32) of fp32 `x` from 0 on, on a logarithmic grid."""
    bits = x.to(tl.int32, bitcast=True)
    subnormal = bits < _NORMAL_BITS
    lifted = tl.where(subnormal, (x * _RAISE).to(tl.int32, bitcast=True), bits)
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
def _encode(
    x_ptr, other_ptr, codes_ptr, table_ptr, sums_ptr, n: tl.int64, width, per_unit, threshold: tl.int64, eps,
    KIND: tl.constexpr, PER_OCTAVE: tl.constexpr, TOP: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Codes, and sums over x**2 and (decoded - x)**2; KIND `compare` has no codes, and `other` for what is decoded."""
    limit = threshold.to(tl.int32)
    sum_sq, sum_sq_diff = tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float64)
    furthest, top = tl.zeros([THREADS], tl.float32), tl.zeros([THREADS], tl.uint32)
    # The SIDE neighbours that a wide store takes, and all rounds of them, lie in one thread.
    lanes: tl.constexpr = THREADS * SIDE
    within = tl.arange(0, TILE // lanes)[:, None] * lanes + tl.arange(0, lanes)[None, :]
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, TILE), tl.num_programs(0)):
        offset = tile * TILE + within
        x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
        if KIND == "direction" or KIND == "compare":
            other = tl.load(other_ptr + offset, mask=offset < n, other=0.0)
        if KIND == "compare":
            decoded = other
        elif KIND == "logarithmic":
            code = log_number(x, PER_OCTAVE)
            decoded = log_value(code, table_ptr, TOP)
        else:
            if KIND == "direction":
                x = tl.div_rn(x, tl.sqrt_rn(other) + eps)
            code = number(x, per_unit, limit)
            decoded = value(code, width, limit)
        if KIND != "compare":
            tl.store(codes_ptr + offset, code.to(codes_ptr.dtype.element_ty), mask=offset < n)
        exact = x.to(tl.float64)
        difference = decoded.to(tl.float64) - exact
        sum_sq += _total(exact, SIDE)
        sum_sq_diff += _total(difference, SIDE)
        furthest = tl.maximum(furthest, _largest(tl.abs(decoded - x), SIDE))
        if KIND == "logarithmic":
            bits = unsigned_bits(x)
        else:
            bits = magnitude_bits(x).to(tl.uint32, bitcast=True)
        if KIND == "direction":  # a moment that is not finite shows in the direction, except an infinite v
            bits = tl.maximum(bits, unsigned_bits(other))
        if KIND == "compare":
            bits = tl.maximum(bits, magnitude_bits(other).to(tl.uint32, bitcast=True))
        top = tl.maximum(top, _largest(bits, SIDE))
    row = sums_ptr + tl.program_id(0).to(tl.int64) * 4
    tl.store(row, tl.sum(sum_sq, axis=0))
    tl.store(row + 1, tl.sum(sum_sq_diff, axis=0))
    tl.store(row + 2, tl.max(furthest, axis=0).to(tl.float64))
    tl.store(row + 3, tl.max(top, axis=0).to(tl.float64))


@triton.jit
def _decode(
    codes_ptr, v_ptr, table_ptr, out_ptr, n: tl.int64, width, threshold: tl.int64, eps, KIND: tl.constexpr,
    TOP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    code = tl.load(codes_ptr + offset, mask=offset < n, other=0).to(tl.int32)
    if KIND == "logarithmic":
        out = log_value(code, table_ptr, TOP)
    else:
        out = value(code, width, threshold.to(tl.int32))
        if KIND == "direction":
            v = tl.load(v_ptr + offset, mask=offset < n, other=0.0)
            out = tl.minimum(tl.maximum(out * (tl.sqrt_rn(v) + eps), -_LARGEST), _LARGEST)
    tl.store(out_ptr + offset, out, mask=offset < n)


def encode_uniform(x: Tensor, codes: Tensor, *, grid: Grid) -> tuple[int, Comparison]:
    """See `reference.grid.encode_uniform`."""
    sums = _measure("uniform", x, x, codes, grid)
    return (0, sums) if sums else (flags_of(x, signed=True), NO_DIFFERENCE)


def encode_direction(m: Tensor, v: Tensor, codes: Tensor, *, grid: Grid, eps: float) -> tuple[int, Comparison]:
    """See `reference.grid.encode_direction`."""
    if sums := _measure("direction", m, v, codes, grid, eps):
        return 0, sums
    flags = flags_of(m, signed=True) | flags_of(v, signed=False)
    return flags or kernels.INF, NO_DIFFERENCE  # finite moments whose ratio is not


def encode_logarithmic(x: Tensor, codes: Tensor, *, grid: LogGrid) -> tuple[int, Comparison]:
    """See `reference.logarithm.encode_logarithmic`."""
    sums = _measure("logarithmic", x, x, codes, grid)
    return (0, sums) if sums else (flags_of(x, signed=False), NO_DIFFERENCE)


def compare(a: Tensor, b: Tensor) -> Comparison:
    """See `reference.statistics.compare`; finite fp32 runs here, all else there."""
    plain = a.dtype == torch.float32 or not a.numel()
    return (_measure("compare", a, b, a, None) if plain else None) or reference.compare(a, b)


def decode_uniform(codes: Tensor, out: Tensor, *, grid: Grid) -> None:
    """See `reference.grid.decode_uniform`."""
    _fill("uniform", codes, out, out, grid)


def decode_direction(codes: Tensor, v: Tensor, out: Tensor, *, grid: Grid, eps: float) -> None:
    """See `reference.grid.decode_direction`."""
    _fill("direction", codes, v, out, grid, eps)


def decode_logarithmic(codes: Tensor, out: Tensor, *, grid: LogGrid) -> None:
    """See `reference.logarithm.decode_logarithmic`."""
    _fill("logarithmic", codes, out, out, grid)


def _measure(
    kind: str, x: Tensor, other: Tensor, codes: Tensor, grid: Grid | LogGrid | None, eps: float = 0.0
) -> Comparison | None:
    """Launch `_encode`; its sums, or None if it found what is not finite, or below 0 where that may not be."""
    n = x.numel()
    with on(x):
        if not n:
            return NO_DIFFERENCE
        sums = torch.empty(min(PROGRAMS, -(-n // TILE)), 4, dtype=torch.float64, device=x.device)
        per_octave, top = (grid.per_octave, grid.top) if isinstance(grid, LogGrid) else (0, 0)
        table, width, per_unit, threshold = _numbers(grid, x)
        run(
            _encode, len(sums), x, other, codes, table, sums, n, width, per_unit, threshold, eps, KIND=kind,
            PER_OCTAVE=per_octave, TOP=top, TILE=TILE, SIDE=16 // codes.element_size(),
        )  # fmt: skip
        totals = to_host(sums)
    if totals[:, 3].max() >= _INF_BITS.value:
        return None
    return Comparison(float(totals[:, 0].sum()), float(totals[:, 1].sum()), float(totals[:, 2].max()), 0)


def _fill(kind: str, codes: Tensor, v: Tensor, out: Tensor, grid: Grid | LogGrid, eps: float = 0.0) -> None:
    """Launch `_decode`."""
    n, top = out.numel(), grid.top if isinstance(grid, LogGrid) else 0
    table, width, _, threshold = _numbers(grid, out)
    run(_decode, -(-n // TILE), codes, v, table, out, n, width, threshold, eps, KIND=kind, TOP=top, TILE=TILE)


def _numbers(grid: Grid | LogGrid | None, like: Tensor) -> tuple[Tensor, float, float, int]:
    """What a kernel knows of a grid: a logarithmic one's table; a linear one's width, its reciprocal, its threshold."""
    if isinstance(grid, Grid):
        return like, grid.width, grid.per_unit, grid.threshold
    return _table(grid, like.device) if grid else like, 0.0, 0.0, 0


@lru_cache(maxsize=128)
def _table(grid: LogGrid, device: torch.device) -> Tensor:
    return torch.from_numpy(grid.table).to(device)
