"""Block means in Triton: the device tree sum, shared with the fused FOAM step, and the stand-alone kernels.

Same bits as `reference.folding`: sums are a binary tree over neighbours, which a hardware reduction would not promise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec import kernels
from statecodec.kernels.triton.runtime import OPTIONS, TILE, flag_word, found, on, power_of_two

_NAN, _INF, _INF_BITS = tl.constexpr(kernels.NAN), tl.constexpr(kernels.INF), tl.constexpr(0x7F800000)

WIDEST = 4096  # a block is summed in pieces of at most this many elements


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
    BLOCK: tl.constexpr, COUNT: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """out = tree sums of BLOCK neighbours; DIVIDE: over the true count of a block of `span` in a row of `length`."""
    index = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    row = index // blocks
    block = index - row * blocks
    col = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row[:, None] * cols + col, mask=(row < rows)[:, None] & (col < cols), other=0.0)
    total = tree_sum(x, COUNT, BLOCK)
    if DIVIDE:
        bits = total.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        bits = tl.where(row < rows, bits, 0)
        if tl.max(bits, axis=0) >= _INF_BITS:
            found = tl.max(tl.where(bits > _INF_BITS, _NAN, 0), axis=0)
            tl.atomic_or(flags_ptr, found | tl.max(tl.where(bits == _INF_BITS, _INF, 0), axis=0))
        count = tl.minimum(length - block * span, span).to(tl.float32)
        total = tl.div_rn(total, tl.where(row < rows, count, 1.0))
    tl.store(out_ptr + index, total, mask=row < rows)


@triton.jit
def _repeat(mean_ptr, out_ptr, rows: tl.int64, cols: tl.int64, blocks: tl.int64, block: tl.int64, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = offset // cols
    source = row * blocks + (offset - row * cols) // block
    tl.store(out_ptr + offset, tl.load(mean_ptr + source, mask=row < rows), mask=row < rows)


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
        return found(flags)


def unfold(mean: Tensor, out: Tensor, *, block: int) -> None:
    """See `reference.folding.unfold`."""
    rows, cols = out.shape
    with on(out):
        if out.numel():
            _repeat[(-(-out.numel() // TILE),)](mean, out, rows, cols, mean.shape[1], block, TILE=TILE, **OPTIONS)


def _launch_sum(x: Tensor, out: Tensor, flags: Tensor, length: int, span: int, block: int, *, divide: bool) -> None:
    rows, cols = x.shape
    count = max(1, min(TILE // block, power_of_two(out.numel())))
    _sum[(-(-out.numel() // count),)](
        x, out, flags, rows, cols, out.shape[1], length, span, BLOCK=block, COUNT=count, DIVIDE=divide, **OPTIONS
    )
