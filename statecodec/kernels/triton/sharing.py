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
from statecodec.kernels.triton.stored import load_float
from statecodec.kernels.triton.tables import number, own_chunk

# A piece: so many values that are kept, and so many rows of neighbours (or neighbours in a row) that they are means of,
# of which a tile has PART. VALUES: moments of one program of `share`.
ROWS, ROW_PARTS, COLUMNS, COLUMN_PARTS, VALUES = (64, 2, 128, 4, 4096) if INTERPRETED else (16, 16, 64, 16, 1024)
_ROWS, _ROW_PARTS, _COLUMNS, _COLUMN_PARTS, _VALUES = (
    tl.constexpr(n) for n in (ROWS, ROW_PARTS, COLUMNS, COLUMN_PARTS, VALUES)
)
LANES, LINES = tl.constexpr(128), tl.constexpr(32)


def pieces(outer: int, shared: int, inner: int) -> tuple[int, int]:
    """How many programs of `squares` look at such a parameter, and how many partial sums they leave of each value."""
    along = -(-shared // (ROW_PARTS * LANES.value if inner == 1 else COLUMN_PARTS * LINES.value))
    kept = -(-outer // ROWS) if inner == 1 else outer * -(-inner // COLUMNS)
    return max(1, kept * along), along


@triton.jit
def squares(news, table, chunks, scalars, m_table, v_table, SPEC: tl.constexpr):
    """The sums of squares of one piece of a gradient, seen as OUTER x SHARED x INNER, over SHARED."""
    _, fields, gradient, piece = own_chunk(news, table, chunks)
    piece = piece.to(tl.int64)
    if gradient != 0:
        outer, shared, inner = (
            tl.load(fields + t.OUTER),
            tl.load(fields + t.SHARED),
            tl.load(fields + t.INNER),
        )
        scratch = tl.load(fields + t.SCRATCH).to(tl.pointer_type(tl.float32))
        if inner == 1:
            _sum(gradient, scratch, piece, 1, outer, shared, shared, 1, _ROWS, _ROW_PARTS, LANES, SPEC)
        else:
            _sum(gradient, scratch, piece, outer, inner, shared, 1, inner, _COLUMNS, _COLUMN_PARTS, LINES, SPEC)


@triton.jit
def _sum(
    gradient, scratch, tile, planes, values, shared, values_apart, shared_apart, VALUES: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """VALUES sums over PARTS times PART squares each. Scratch: [pieces of a sum, planes, values]."""
    along = (shared + PARTS * PART - 1) // (PARTS * PART)
    stripes = (values + VALUES - 1) // VALUES
    value = (tile // along % stripes) * VALUES + tl.arange(0, VALUES)
    piece, plane = tile % along, tile // (along * stripes)
    total = tl.zeros([VALUES, PART], tl.float32)
    GRADIENT: tl.constexpr = SPEC.gradient
    for part in range(PARTS):
        line = (piece * PARTS + part) * PART + tl.arange(0, PART)
        at = plane * values * shared + value[:, None] * values_apart + line[None, :] * shared_apart
        inside = (value < values)[:, None] & (line < shared)[None, :]
        g = load_float(gradient, at, inside, GRADIENT, SPEC)
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
        length = tl.where(inner == 1, _ROW_PARTS * LANES, _COLUMN_PARTS * LINES)
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
