"""Log codes in Triton; the arithmetic is that of `reference.logarithm`."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec.kernels import curves, grids
from statecodec.kernels.grids import LogGrid
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison
from statecodec.kernels.triton.companding import flags_of, unsigned_bits
from statecodec.kernels.triton.grid import (
    SIDE,
    THREADS,
    add_sums,
    finish,
    largest,
    leave_sums,
    no_sums,
    programs,
    sum_rows,
    tile_of,
    tiles,
)
from statecodec.kernels.triton.runtime import OPTIONS, TILE, on
from statecodec.kernels.triton.words import looked_up

_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in curves.LOG2)
_NORMAL_BITS, _FIRST, _RAISE = tl.constexpr(0x00800000), tl.constexpr(127 + grids.LOWEST), tl.constexpr(2.0**32)


@triton.jit
def log_number(x, STEPS: tl.constexpr):
    """Codes (int32) of fp32 `x` from 0 on."""
    bits = x.to(tl.int32, bitcast=True)
    subnormal = bits < _NORMAL_BITS
    lifted = tl.where(subnormal, (x * _RAISE).to(tl.int32, bitcast=True), bits)
    f = ((lifted & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    log2 = f * (_C0 + f * (_C1 + f * (_C2 + f * _C3)))
    octave = (lifted >> 23) - _FIRST - tl.where(subnormal, 32, 0)
    code = 1 + octave * STEPS + (log2 * STEPS + 0.5).to(tl.int32)
    return tl.where(x > 0, code, 0)


@triton.jit
def _encode_logarithmic(
    x_ptr, codes_ptr, table_ptr, sums_ptr, n: tl.int64, STEPS: tl.constexpr, TOP: tl.constexpr, TILE: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    sum_sq, sum_sq_diff, furthest = no_sums()
    top = tl.zeros([THREADS], tl.uint32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, TILE), tl.num_programs(0)):
        offset = tile_of(tile, TILE, SIDE)
        x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
        code = log_number(x, STEPS)
        tl.store(codes_ptr + offset, code.to(tl.int16), mask=offset < n)
        decoded = looked_up(table_ptr, tl.minimum(tl.maximum(code, 0), TOP))
        sum_sq, sum_sq_diff, furthest = add_sums(sum_sq, sum_sq_diff, furthest, x, decoded, SIDE)
        top = tl.maximum(top, largest(unsigned_bits(x), SIDE))
    leave_sums(sums_ptr, sum_sq, sum_sq_diff, furthest, top)


@triton.jit
def _decode_logarithmic(codes_ptr, table_ptr, out_ptr, n: tl.int64, TOP: tl.constexpr, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    code = tl.load(codes_ptr + offset, mask=offset < n, other=0).to(tl.int32)
    tl.store(out_ptr + offset, looked_up(table_ptr, tl.minimum(tl.maximum(code, 0), TOP)), mask=offset < n)


def encode_logarithmic(x: Tensor, codes: Tensor, *, grid: LogGrid) -> tuple[int, Comparison]:
    """See `reference.logarithm.encode_logarithmic`."""
    n = x.numel()
    with on(x):
        if not n:
            return 0, NO_DIFFERENCE
        sums = sum_rows(x)
        _encode_logarithmic[programs(n)](
            x,
            codes,
            _table(grid, x.device),
            sums,
            n,
            STEPS=grid.steps,
            TOP=grid.top,
            TILE=TILE,
            SIDE=2 * SIDE,
            **OPTIONS,
        )
        made = finish(sums)
        return (0, made) if made else (flags_of(x, signed=False), NO_DIFFERENCE)


def decode_logarithmic(codes: Tensor, out: Tensor, *, grid: LogGrid) -> None:
    """See `reference.logarithm.decode_logarithmic`."""
    n = out.numel()
    with on(out):
        if n:
            table = _table(grid, out.device)
            _decode_logarithmic[tiles(n)](codes, table, out, n, TOP=grid.top, TILE=TILE, **OPTIONS)


@lru_cache(maxsize=128)
def _table(grid: LogGrid, device: torch.device) -> Tensor:
    return torch.from_numpy(grid.table).to(device)
