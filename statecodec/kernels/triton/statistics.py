"""The sums that errors are reported from, on the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec.kernels.reference import statistics as reference
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison
from statecodec.kernels.triton.companding import magnitude_bits
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
)
from statecodec.kernels.triton.runtime import OPTIONS, TILE, on


@triton.jit
def _compare(a_ptr, b_ptr, sums_ptr, n: tl.int64, TILE: tl.constexpr, SIDE: tl.constexpr):
    sum_sq, sum_sq_diff, furthest = no_sums()
    top = tl.zeros([THREADS], tl.int32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, TILE), tl.num_programs(0)):
        offset = tile_of(tile, TILE, SIDE)
        a = tl.load(a_ptr + offset, mask=offset < n, other=0.0)
        b = tl.load(b_ptr + offset, mask=offset < n, other=0.0)
        sum_sq, sum_sq_diff, furthest = add_sums(sum_sq, sum_sq_diff, furthest, a, b, SIDE)
        top = tl.maximum(top, largest(tl.maximum(magnitude_bits(a), magnitude_bits(b)), SIDE))
    leave_sums(sums_ptr, sum_sq, sum_sq_diff, furthest, top)


def compare(a: Tensor, b: Tensor) -> Comparison:
    """See `reference.statistics.compare`; finite fp32 runs here, all else there."""
    n = a.numel()
    if a.dtype != torch.float32 or not n:
        return reference.compare(a, b) if n else NO_DIFFERENCE
    with on(a):
        sums = sum_rows(a)
        _compare[programs(n)](a, b, sums, n, TILE=TILE, SIDE=SIDE, **OPTIONS)
        return finish(sums) or reference.compare(a, b)
