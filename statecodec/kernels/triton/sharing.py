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
from statecodec.kernels.triton.tables import number, own_chunk
from statecodec.kernels.triton.tiles import load_float

# What a program of `squares` adds up: so many sums, of so many parts of so many squares each. ROW is for values of a
# row that share a moment, COLUMN for values of a column; both are wide along what lies in a row.
ROW, COLUMN = ((64, 2, 128), (128, 4, 32)) if INTERPRETED else ((16, 16, 128), (64, 16, 32))
VALUES = 4096 if INTERPRETED else 1024  # moments of a program of `share`
_ROW, _COLUMN, _VALUES = tl.constexpr(ROW), tl.constexpr(COLUMN), tl.constexpr(VALUES)


def pieces(outer: int, shared: int, inner: int) -> tuple[int, int]:
    """How many programs of `squares` look at such a parameter, and how many partial sums they leave of each value."""
    sums, parts, part = ROW if inner == 1 else COLUMN
    along = -(-shared // (parts * part))
    kept = -(-outer // sums) if inner == 1 else outer * -(-inner // sums)
    return max(1, kept * along), along


@triton.jit
def squares(news, table, chunks, scalars, m_table, v_table, SPEC: tl.constexpr):
    """The sums of squares of one piece of a gradient, seen as OUTER x SHARED x INNER, over SHARED."""
    _, fields, gradient, piece = own_chunk(news, table, chunks)
    piece = piece.to(tl.int64)
    if gradient != 0:
        outer, shared, inner = tl.load(fields + t.OUTER), tl.load(fields + t.SHARED), tl.load(fields + t.INNER)
        scratch = tl.load(fields + t.SCRATCH).to(tl.pointer_type(tl.float32))
        if inner == 1:
            _sum(gradient, scratch, piece, (1, outer, shared, shared, 1), _ROW, SPEC)
        else:
            _sum(gradient, scratch, piece, (outer, inner, 1, shared, inner), _COLUMN, SPEC)


@triton.jit
def _sum(gradient, scratch, place, view, PIECE: tl.constexpr, SPEC: tl.constexpr):
    """The sums of the piece at this place. Scratch: [pieces of a sum, planes, values]."""
    planes, values, values_apart, shared, shared_apart = view
    SUMS: tl.constexpr = PIECE[0]
    PARTS: tl.constexpr = PIECE[1]
    PART: tl.constexpr = PIECE[2]
    GRADIENT: tl.constexpr = SPEC.gradient
    along = (shared + PARTS * PART - 1) // (PARTS * PART)
    stripes = (values + SUMS - 1) // SUMS
    value = (place // along % stripes) * SUMS + tl.arange(0, SUMS)
    piece, plane = place % along, place // (along * stripes)
    total = tl.zeros([SUMS, PART], tl.float32)
    for part in range(PARTS):
        line = (piece * PARTS + part) * PART + tl.arange(0, PART)
        at = plane * values * shared + value[:, None] * values_apart + line[None, :] * shared_apart
        inside = (value < values)[:, None] & (line < shared)[None, :]
        g = load_float(gradient, at, inside, GRADIENT, SPEC.whole)
        total += g * g
    tl.store(scratch + (piece * planes + plane) * values + value, tl.sum(total, axis=1), mask=value < values)


@triton.jit
def share(news, table, chunks, scalars, m_table, v_table, SPEC: tl.constexpr):
    """VALUES new second moments, from the partial sums: into scratch memory as they are, into the state if finite."""
    _, fields, gradient, block = own_chunk(news, table, chunks)
    if gradient != 0:
        shared, inner = tl.load(fields + t.SHARED), tl.load(fields + t.INNER)
        scratch = tl.load(fields + t.SCRATCH).to(tl.pointer_type(tl.float32))
        moments = tl.load(fields + t.V_DATA).to(tl.pointer_type(tl.float32))
        values = tl.load(fields + t.OUTER) * inner
        length = tl.where(inner == 1, _ROW[1] * _ROW[2], _COLUMN[1] * _COLUMN[2])
        lane = block.to(tl.int64) * _VALUES + tl.arange(0, _VALUES)
        total = tl.zeros([_VALUES], tl.float32)
        for piece in range((shared + length - 1) // length):
            total += tl.load(scratch + piece * values + lane, mask=lane < values, other=0.0)
        mean = tl.div_rn(total, tl.full([_VALUES], 1.0, tl.float32) * shared.to(tl.float32))
        v = tl.load(moments + lane, mask=lane < values, other=0.0)
        beta2 = number(news, t.BETA2)
        v = tl.fma(mean, (1.0 - beta2).to(tl.float32), v * beta2.to(tl.float32))
        tl.store(scratch + lane, v, mask=lane < values)
        tl.store(moments + lane, v, mask=(lane < values) & (too_large(v) == 0))
