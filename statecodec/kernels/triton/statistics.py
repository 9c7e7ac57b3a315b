"""The sums that errors are reported from, on the GPU."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec.kernels.reference import statistics as reference
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison
from statecodec.kernels.triton.grid import finish, leave_sums, programs, sum_rows
from statecodec.kernels.triton.runtime import OPTIONS, TILE, flag_word, on


@triton.jit
def _compare(a_ptr, b_ptr, sums_ptr, n: tl.int64, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    a = tl.load(a_ptr + offset, mask=offset < n, other=0.0)
    leave_sums(sums_ptr, a, tl.load(b_ptr + offset, mask=offset < n, other=0.0))


def compare(a: Tensor, b: Tensor) -> Comparison:
    """See `reference.statistics.compare`; finite fp32 runs here, all else there."""
    n = a.numel()
    if a.dtype != torch.float32 or not n:
        return reference.compare(a, b) if n else NO_DIFFERENCE
    with on(a):
        sums = sum_rows(a)
        _compare[programs(n)](a, b, sums, n, TILE=TILE, **OPTIONS)
        found = finish(flag_word(a), sums)[1]
    return found if math.isfinite(found.sum_sq) and math.isfinite(found.sum_sq_diff) else reference.compare(a, b)
