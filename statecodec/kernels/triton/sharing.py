"""SlimAdam's shared second moments: sums of squares over whole dimensions, then the new moments.

Two launches before the step. `squares` leaves one partial sum per piece in scratch memory, each written by one program;
`share` adds them up in a fixed order: a step is reproducible, which atomic additions would not be. A moment that would
not be finite keeps its old value; the new one, left in scratch memory, makes every weight that it stands for keep its
own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.triton import tables as t
from statecodec.kernels.triton.rules import too_large
from statecodec.kernels.triton.runtime import INTERPRETED
from statecodec.kernels.triton.scalars import entry, number, own_chunk
from statecodec.kernels.triton.stored import load_gradient

# Pieces: HIGH rows of WIDE elements, or TALL rows of BROAD columns. VALUES: moments of one program of `share`.
HIGH, WIDE, TALL, BROAD, VALUES = (64, 256, 128, 128, 4096) if INTERPRETED else (16, 2048, 512, 64, 1024)
_HIGH, _WIDE, _TALL, _BROAD = (tl.constexpr(n) for n in (HIGH, WIDE, TALL, BROAD))
_VALUES, _LANES, _LINES = tl.constexpr(VALUES), tl.constexpr(128), tl.constexpr(32)


def pieces(outer: int, shared: int, inner: int) -> tuple[int, int]:
    """How many programs of `squares` look at such a parameter, and how many partial sums they leave of each value."""
    if inner == 1:
        along = -(-shared // WIDE)
        return max(1, -(-outer // HIGH) * along), along
    along = -(-shared // TALL)
    return max(1, outer * along * -(-inner // BROAD)), along


@triton.jit
def squares(news, table, chunks, count: tl.int64, SPEC: tl.constexpr):
    """The sums of squares of one piece of a gradient, seen as OUTER x SHARED x INNER, over SHARED."""
    at, piece = own_chunk(chunks)
    piece = piece.to(tl.int64)
    fields, gradient = table + at, tl.load(news + at)
    if gradient != 0:
        if entry(fields, count, t.INNER) == 1:
            _of_rows(gradient, fields, count, piece, SPEC)
        else:
            _of_columns(gradient, fields, count, piece, SPEC)


@triton.jit
def _of_rows(gradient, fields, count, tile, SPEC: tl.constexpr):
    """HIGH rows, WIDE elements of each. Scratch: [pieces along a row, OUTER]."""
    outer, shared = entry(fields, count, t.OUTER), entry(fields, count, t.SHARED)
    scratch = entry(fields, count, t.SCRATCH).to(tl.pointer_type(tl.float32))
    along = (shared + _WIDE - 1) // _WIDE
    piece = tile % along
    line = (tile // along) * _HIGH + tl.arange(0, _HIGH)
    total = tl.zeros([_HIGH, _LANES], tl.float32)
    for part in range(_WIDE // _LANES):
        lane = piece * _WIDE + part * _LANES + tl.arange(0, _LANES)
        inside = (line < outer)[:, None] & (lane < shared)[None, :]
        g = load_gradient(gradient, line[:, None] * shared + lane[None, :], inside, SPEC)
        total += g * g
    tl.store(scratch + piece * outer + line, tl.sum(total, axis=1), mask=line < outer)


@triton.jit
def _of_columns(gradient, fields, count, tile, SPEC: tl.constexpr):
    """TALL rows of BROAD neighbouring columns. Scratch: [pieces along a column, OUTER, INNER]."""
    outer, shared = entry(fields, count, t.OUTER), entry(fields, count, t.SHARED)
    inner = entry(fields, count, t.INNER)
    scratch = entry(fields, count, t.SCRATCH).to(tl.pointer_type(tl.float32))
    stripes = (inner + _BROAD - 1) // _BROAD
    along = (shared + _TALL - 1) // _TALL
    column = (tile % stripes) * _BROAD + tl.arange(0, _BROAD)
    piece = (tile // stripes) % along
    plane = tile // (stripes * along)
    total = tl.zeros([_LINES, _BROAD], tl.float32)
    for part in range(_TALL // _LINES):
        line = piece * _TALL + part * _LINES + tl.arange(0, _LINES)
        inside = (line < shared)[:, None] & (column < inner)[None, :]
        g = load_gradient(gradient, (plane * shared + line)[:, None] * inner + column[None, :], inside, SPEC)
        total += g * g
    tl.store(scratch + (piece * outer + plane) * inner + column, tl.sum(total, axis=0), mask=column < inner)


@triton.jit
def share(news, table, chunks, count: tl.int64):
    """VALUES new second moments, from the partial sums: into scratch memory as they are, into the state if finite."""
    at, block = own_chunk(chunks)
    fields = table + at
    if tl.load(news + at) != 0:
        shared, inner = entry(fields, count, t.SHARED), entry(fields, count, t.INNER)
        scratch = entry(fields, count, t.SCRATCH).to(tl.pointer_type(tl.float32))
        moments = entry(fields, count, t.V_DATA).to(tl.pointer_type(tl.float32))
        values = entry(fields, count, t.OUTER) * inner
        along = (shared + _TALL - 1) // _TALL
        if inner == 1:
            along = (shared + _WIDE - 1) // _WIDE
        lane = block.to(tl.int64) * _VALUES + tl.arange(0, _VALUES)
        total = tl.zeros([_VALUES], tl.float32)
        for piece in range(along):
            total += tl.load(scratch + piece * values + lane, mask=lane < values, other=0.0)
        mean = tl.div_rn(total, tl.full([_VALUES], 1.0, tl.float32) * shared.to(tl.float32))
        v = tl.load(moments + lane, mask=lane < values, other=0.0)
        beta2 = number(news, count, t.BETA2)
        v = tl.fma(mean, (1.0 - beta2).to(tl.float32), v * beta2.to(tl.float32))
        tl.store(scratch + lane, v, mask=lane < values)
        tl.store(moments + lane, v, mask=(lane < values) & (too_large(v) == 0))
