"""Block means in Triton: the device tree sum, shared with the fused FOAM step, and the stand-alone kernels.

Same bits as `reference.folding`: sums are a binary tree over neighbours. A hardware reduction guarantees no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec import kernels
from statecodec.kernels.triton.runtime import OPTIONS, TILE, flag_word, flags_on_host, on, power_of_two

_NAN, _INF, _INF_BITS = tl.constexpr(kernels.NAN), tl.constexpr(kernels.INF), tl.constexpr(0x7F800000)

WIDEST = 4096  # a block is summed in pieces of at most this many elements
PIECE = 128  # a mean is repeated in pieces of at most this many


@triton.jit
def tree_sum(x, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the last dimension of x [COUNT, BLOCK], as a binary tree of neighbours."""
    width: tl.constexpr = BLOCK
    if width == 1:
        total = tl.reshape(x, [COUNT])
    else:
        even, odd = tl.split(tl.reshape(x, [COUNT, width // 2, 2]))
        total = tree_sum(even + odd, COUNT, width // 2)
    return total


@triton.jit
def _sum(
    x_ptr, out_ptr, flags_ptr, rows: tl.int64, cols: tl.int64, blocks: tl.int64, length: tl.int64, span: tl.int64,
    share, BLOCK: tl.constexpr, COUNT: tl.constexpr, DIVIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out = tree sums of BLOCK neighbours; DIVIDE: over the true count of a block of `span` in a row of `length`.

    EVEN: whole blocks fill every row, and each mean is its `share` of a sum.
    """
    index = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    there = index < rows * blocks
    if EVEN:
        # The mask is the same along a block: so the compiler can use wide loads.
        lane = tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + index[:, None] * BLOCK + lane, mask=there[:, None] & (lane >= 0), other=0.0)
    else:
        row = index // blocks
        block = index - row * blocks
        col = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + row[:, None] * cols + col, mask=there[:, None] & (col < cols), other=0.0)
    total = tree_sum(x, COUNT, BLOCK)
    if DIVIDE:
        bits = total.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        flag = tl.where(bits > _INF_BITS, _NAN, _INF)
        tl.atomic_or(flags_ptr + index * 0, flag, mask=there & (bits >= _INF_BITS), sem="relaxed")
        if EVEN:  # a power of two: the product is the quotient
            total *= share
        else:
            count = tl.minimum(length - block * span, span).to(tl.float32)
            total = tl.div_rn(total, tl.where(there, count, 1.0))
    tl.store(out_ptr + index, total, mask=there)


@triton.jit
def _repeat(
    mean_ptr, out_ptr, rows: tl.int64, cols: tl.int64, blocks: tl.int64, block: tl.int64, BLOCK: tl.constexpr,
    PIECES: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Each mean as often as its block is long. EVEN: whole blocks fill every row; each is PIECES times BLOCK long."""
    index = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    if EVEN:
        there = index < rows * blocks * PIECES
        mean = tl.load(mean_ptr + index // PIECES, mask=there, other=0.0)
        lane = tl.arange(0, BLOCK)[None, :]
        value = tl.broadcast_to(mean[:, None], [COUNT, BLOCK])
        tl.store(out_ptr + index[:, None] * BLOCK + lane, value, mask=there[:, None] & (lane >= 0))
    else:
        row = index // cols
        source = row * blocks + (index - row * cols) // block
        tl.store(out_ptr + index, tl.load(mean_ptr + source, mask=row < rows), mask=row < rows)


def fold_mean(x: Tensor, out: Tensor, *, block: int) -> int:
    """See `reference.folding.fold_mean`. Reading the flags synchronises with the device, once."""
    rows, cols = x.shape
    with on(x):
        if not out.numel():
            return 0
        flags = flag_word(x)
        span, piece = block, min(block, WIDEST)
        while span > piece:  # sums of pieces, then sums of those: still one tree
            partial = torch.empty(rows, -(-x.shape[1] // piece), dtype=torch.float32, device=x.device)
            _launch_sum(x, partial, flags, cols, block, piece, divide=False)
            x, span = partial, span // piece
            piece = min(span, WIDEST)
        _launch_sum(x, out, flags, cols, block, piece, divide=True)
        return flags_on_host(flags)


def unfold(mean: Tensor, out: Tensor, *, block: int) -> None:
    """See `reference.folding.unfold`."""
    rows, cols = out.shape
    with on(out):
        if out.numel():
            even = cols % block == 0
            piece = min(block, PIECE) if even else 1
            _repeat[(-(-out.numel() // TILE),)](
                mean, out, rows, cols, mean.shape[1], block, BLOCK=piece, PIECES=block // piece if even else 1,
                COUNT=TILE // piece, EVEN=even, **OPTIONS,
            )  # fmt: skip


def _launch_sum(x: Tensor, out: Tensor, flags: Tensor, length: int, span: int, block: int, *, divide: bool) -> None:
    rows, cols = x.shape
    count = max(1, min(TILE // block, power_of_two(out.numel())))
    even = cols % block == 0 and (not divide or length % span == 0)
    _sum[(-(-out.numel() // count),)](
        x, out, flags, rows, cols, out.shape[1], length, span, 1.0 / span, BLOCK=block, COUNT=count, DIVIDE=divide,
        EVEN=even, **OPTIONS,
    )  # fmt: skip
