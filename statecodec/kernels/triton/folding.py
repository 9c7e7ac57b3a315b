"""Block means in Triton: the device tree sum, shared with the fused FOAM step, and the stand-alone kernels.

Same bits as `reference.folding`, which takes blocks of more than WIDEST values itself: sums are a binary tree over
neighbours, where a hardware reduction guarantees no order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from statecodec.kernels.reference import folding as reference
from statecodec.kernels.triton.companding import flags_of
from statecodec.kernels.triton.runtime import flag_word, flags_on_host, on, run
from statecodec.kernels.triton.tiles import WIDEST, places, tiled
from statecodec.kernels.triton.words import INF_BITS, magnitude_bits


@triton.jit
def tree_sum(x, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the last dimension of x [COUNT, BLOCK], as a binary tree of neighbours."""
    if BLOCK == 1:
        total = tl.reshape(x, [COUNT])
    else:
        even, odd = tl.split(tl.reshape(x, [COUNT, BLOCK // 2, 2]))
        total = tree_sum(even + odd, COUNT, BLOCK // 2)
    return total


@triton.jit
def mean_of(x, size, COUNT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Means over the last dimension of x [COUNT, BLOCK]; WHOLE: all blocks have BLOCK elements, else `size` each."""
    total = tree_sum(x, COUNT, BLOCK)
    if WHOLE:  # a power of two: the product is the quotient
        mean = total * (1.0 / BLOCK)
    else:
        mean = tl.div_rn(total, tl.maximum(size, 1).to(tl.float32))
    return mean


@triton.jit
def _fold(x_ptr, out_ptr, refused, rows: tl.int64, cols: tl.int64, TILE: tl.constexpr):
    """The mean of every group of a tile."""
    here, _, _, size = places(rows, cols, tl.program_id(0).to(tl.int64) * TILE.count, TILE)
    x = tl.load(x_ptr + here[1], mask=here[2], other=0.0)
    mean = mean_of(x, size, TILE.count, TILE.width, TILE.whole)
    tl.store(refused + here[0] * 0, 1, mask=here[5] & (magnitude_bits(mean) >= INF_BITS))
    tl.store(out_ptr + here[0], mean, mask=here[5])


@triton.jit
def _unfold(mean_ptr, out_ptr, rows: tl.int64, cols: tl.int64, TILE: tl.constexpr):
    """Each mean as often as its group is long."""
    here, _, _, _ = places(rows, cols, tl.program_id(0).to(tl.int64) * TILE.count, TILE)
    mean = tl.load(mean_ptr + here[0], mask=here[5], other=0.0)
    tl.store(out_ptr + here[1], tl.broadcast_to(mean[:, None], [TILE.count, TILE.width]), mask=here[2])


def fold_mean(x: Tensor, out: Tensor, *, block: int) -> int:
    """See `reference.folding.fold_mean`. Reading the flags synchronises with the device, once."""
    with on(x):
        if block > WIDEST:
            return reference.fold_mean(x, out, block=block)
        tile, programs = tiled(block, x, out)
        refused = flag_word(x)
        run(_fold, programs, x, out, refused, *x.shape, TILE=tile)
        return flags_of(out, signed=True) if flags_on_host(refused) else 0


def unfold(mean: Tensor, out: Tensor, *, block: int) -> None:
    """See `reference.folding.unfold`."""
    with on(out):
        if block > WIDEST:
            reference.unfold(mean, out, block=block)
        else:
            tile, programs = tiled(block, out, mean)
            run(_unfold, programs, mean, out, *out.shape, TILE=tile)
