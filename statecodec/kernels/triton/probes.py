"""The first look at a gradient in a fused step: is it usable, and, for SlimAdam, the sums of its squares.

Sums go to scratch memory, each written by one program, and are added up in a fixed order: a step is reproducible, which
atomic additions would not be.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.triton.companding import magnitude_bits
from statecodec.kernels.triton.steps import load_gradient, pointer
from statecodec.kernels.triton.updates import GRAD, INNER, OUTER, SCRATCH, SHARED, V_DATA

_LANES, _LINES, _VALUES = tl.constexpr(128), tl.constexpr(32), tl.constexpr(1024)  # tile shapes of the sums


@triton.jit
def largest_gradient(
    grad, numel, chunk, KIND: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, ALIGNED: tl.constexpr
):
    """The largest magnitude, as bits, in a chunk of CHUNKS * TILE gradient elements."""
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    largest = tl.zeros([TILE], tl.int32)
    for part in tl.static_range(CHUNKS):
        offset = (chunk * CHUNKS + part) * TILE + tl.arange(0, TILE)
        largest = tl.maximum(largest, magnitude_bits(load_gradient(grad, offset, offset < numel, KIND, ALIGNED)))
    return tl.max(largest, axis=0)


@triton.jit
def largest_and_squares(
    row, tile, KIND: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr, BROAD: tl.constexpr
):
    """As `largest_gradient`, for one piece of OUTER x SHARED x INNER whose sums over SHARED are left in the scratch
    memory."""
    if tl.load(row + INNER) == 1:
        largest = _row_squares(row, tile, KIND, HIGH, WIDE)
    else:
        largest = _column_squares(row, tile, KIND, TALL, BROAD)
    return largest


@triton.jit
def _row_squares(row, tile, KIND: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """HIGH rows, WIDE elements of each. Scratch: [pieces along a row, OUTER]."""
    outer, shared, grad = tl.load(row + OUTER), tl.load(row + SHARED), tl.load(row + GRAD)
    scratch = pointer(tl.load(row + SCRATCH), tl.float32, False)
    pieces = (shared + WIDE - 1) // WIDE
    piece = tile % pieces
    line = (tile // pieces) * HIGH + tl.arange(0, HIGH)
    squares = tl.zeros([HIGH, _LANES], tl.float32)
    bits = tl.zeros([HIGH, _LANES], tl.int32)
    for part in range(WIDE // _LANES):
        at = piece * WIDE + part * _LANES + tl.arange(0, _LANES)
        inside = (line < outer)[:, None] & (at < shared)[None, :]
        g = load_gradient(grad, line[:, None] * shared + at[None, :], inside, KIND, False)
        squares += g * g
        bits = tl.maximum(bits, magnitude_bits(g))
    tl.store(scratch + piece * outer + line, tl.sum(squares, axis=1), mask=line < outer)
    return tl.max(tl.max(bits, axis=1), axis=0)


@triton.jit
def _column_squares(row, tile, KIND: tl.constexpr, TALL: tl.constexpr, BROAD: tl.constexpr):
    """TALL rows of BROAD neighbouring columns. Scratch: [pieces along a column, OUTER, INNER]."""
    outer, shared, inner = tl.load(row + OUTER), tl.load(row + SHARED), tl.load(row + INNER)
    grad, scratch = tl.load(row + GRAD), pointer(tl.load(row + SCRATCH), tl.float32, False)
    stripes = (inner + BROAD - 1) // BROAD
    pieces = (shared + TALL - 1) // TALL
    at = (tile % stripes) * BROAD + tl.arange(0, BROAD)
    piece = (tile // stripes) % pieces
    plane = tile // (stripes * pieces)
    squares = tl.zeros([_LINES, BROAD], tl.float32)
    bits = tl.zeros([_LINES, BROAD], tl.int32)
    for part in range(TALL // _LINES):
        line = piece * TALL + part * _LINES + tl.arange(0, _LINES)
        inside = (line < shared)[:, None] & (at < inner)[None, :]
        g = load_gradient(grad, (plane * shared + line)[:, None] * inner + at[None, :], inside, KIND, False)
        squares += g * g
        bits = tl.maximum(bits, magnitude_bits(g))
    tl.store(scratch + (piece * outer + plane) * inner + at, tl.sum(squares, axis=0), mask=at < inner)
    return tl.max(tl.max(bits, axis=1), axis=0)


@triton.jit
def share(row, beta2, one_beta2, WIDE: tl.constexpr, TALL: tl.constexpr):
    """The shared second moment, from the sums that all probes of this parameter have left."""
    outer, shared, inner = tl.load(row + OUTER), tl.load(row + SHARED), tl.load(row + INNER)
    scratch = pointer(tl.load(row + SCRATCH), tl.float32, False)
    moments = pointer(tl.load(row + V_DATA), tl.float32, False)
    values = outer * inner
    pieces = (shared + TALL - 1) // TALL
    if inner == 1:
        pieces = (shared + WIDE - 1) // WIDE
    for block in range((values + _VALUES - 1) // _VALUES):
        at = block * _VALUES + tl.arange(0, _VALUES)
        total = tl.zeros([_VALUES], tl.float32)
        for piece in range(pieces):
            total += tl.load(scratch + piece * values + at, mask=at < values, other=0.0, cache_modifier=".cg")
        mean = tl.div_rn(total, tl.full([_VALUES], 1.0, tl.float32) * shared.to(tl.float32))
        v = tl.load(moments + at, mask=at < values, other=0.0)
        tl.store(moments + at, tl.fma(mean, one_beta2, v * beta2), mask=at < values)
