"""The fused step of whatever `fast` does not support: any weight, any supported state, any shape, any address.

Each program steps a run of tiles of one parameter; a tile is [groups, lanes], element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.triton import tables as t
from statecodec.kernels.triton import words
from statecodec.kernels.triton.companding import load_state, store_state
from statecodec.kernels.triton.folding import mean_of
from statecodec.kernels.triton.rules import average, direction, stepped, too_large, weight_too_large
from statecodec.kernels.triton.tables import addresses_of, own_chunk, rule_numbers
from statecodec.kernels.triton.tiles import load_float, places
from statecodec.kernels.triton.weights import load_weight, store_weight


@triton.jit
def step_elements(news, table, chunks, scalars, m_table, v_table, SPEC: tl.constexpr):
    """One chunk: SPEC.run tiles of SPEC.count groups, from the first of the chunk on."""
    at, fields, gradient, first = own_chunk(news, table, chunks)
    scalars += at * t.SCALARS
    if gradient != 0:
        tiles = (tl.load(fields + t.GROUPS) + SPEC.count - 1) // SPEC.count
        tiles = tl.minimum(tiles.to(tl.int32) - first, SPEC.run)
        for tile in range(tiles):
            start = (first + tile).to(tl.int64) * SPEC.count
            kept = step_tile(gradient, fields, scalars, m_table, v_table, start, SPEC)
            if kept > 0:
                skipped = tl.load(fields + t.SKIPPED).to(tl.pointer_type(tl.float32))
                tl.atomic_add(skipped, kept.to(tl.float32), sem="relaxed")


@triton.jit
def step_tile(gradient, fields, scalars, m_table, v_table, start, SPEC: tl.constexpr):
    """Step the groups from `start` on, with the blocks of weights that folded moments stand for.

    Returns how many units kept their old bytes.
    """
    M: tl.constexpr = SPEC.m  # triton 3.6 passes on constants only under a name
    V: tl.constexpr = SPEC.v
    GRADIENT: tl.constexpr = SPEC.gradient
    param, low, m_data, m_scales, v_data, v_scales = addresses_of(fields)
    rows, cols = tl.load(fields + t.ROWS), tl.load(fields + t.COLS)
    here, row, first, size = places(rows, (cols + SPEC.block - 1) // SPEC.block, start, SPEC)
    offset, inside = here[1], here[2]
    if SPEC.method == "foam":
        length, offset, inside = blocks_of(here, row, first, size, cols, SPEC)
    if SPEC.shared:  # while few registers are taken
        v = shared_moment(fields, row * cols + first, inside, SPEC)
    w = load_weight(param, low, offset, inside, SPEC)
    g = load_float(gradient, offset, inside, GRADIENT, SPEC.whole)
    m = load_state(m_data, m_scales, m_table, here, M, SPEC) if M is not None else g
    if V is None:
        v = g
    elif not SPEC.shared:
        v = load_state(v_data, v_scales, v_table, here, V, SPEC)
    numbers = rule_numbers(scalars)  # for each tile: kept in registers, Lion's step would spill
    if SPEC.method == "foam":
        w, m, v = stepped_blocks(w, g, m, v, length, numbers, SPEC)
        bad = tl.max((weight_too_large(w, SPEC) & inside).to(tl.int32), axis=1)
        bad = tl.reshape(bad, [SPEC.count, SPEC.width]) > 0
    else:
        w, m, v = stepped(w, g, m, v, numbers, SPEC)
        bad = weight_too_large(w, SPEC)
    if M is not None:
        bad = bad | too_large(m)
    if V is not None:
        bad = bad | too_large(v)
    good, kept = judged((bad & here[2]).to(tl.int32), SPEC)
    if M is not None:
        store_state(m, m_data, m_scales, here, good, M, SPEC)
    if V is not None and not SPEC.shared:
        store_state(v, v_data, v_scales, here, good, V, SPEC)
    if SPEC.method == "foam":
        good = tl.reshape(tl.broadcast_to(good, [SPEC.count, SPEC.width]), [SPEC.count * SPEC.width])[:, None]
    store_weight(w, param, low, offset, inside & good, tl.load(scalars + t.KEY), SPEC)
    return kept


@triton.jit
def stepped_blocks(w, g, m, v, length, numbers, SPEC: tl.constexpr):
    """Blocks of weights [TALL, BLOCK] and their folded moments [COUNT, WIDTH] after one step of FOAM."""
    BLOCK: tl.constexpr = SPEC.block
    TALL: tl.constexpr = SPEC.count * SPEC.width
    FULL: tl.constexpr = SPEC.whole or not SPEC.true_tail  # every mean is over BLOCK weights
    decay, size, root, reciprocal, _gain, _keep_1, rate_1, keep_2, rate_2, eps, _l2, _heavy, residual = numbers
    if SPEC.maximize:
        g = words.negated(g)
    mean = mean_of(g, length, TALL, BLOCK, FULL)
    square = mean_of(g * g, length, TALL, BLOCK, FULL) if SPEC.mean_of_squares else mean * mean
    m = average(m, tl.reshape(mean, [SPEC.count, SPEC.width]), rate_1)
    v = v * keep_2 + rate_2 * tl.reshape(square, [SPEC.count, SPEC.width])
    rest = residual * (g - mean[:, None])
    numerator = tl.reshape(m, [TALL])[:, None] + rest
    second = rest * rest + tl.reshape(v, [TALL])[:, None]
    change = size * direction(numerator, second, root, reciprocal, eps, False)
    w = w * decay - change if SPEC.decay_first else (w - change) * decay
    return w, m, v


@triton.jit
def judged(bad, SPEC: tl.constexpr):
    """Which units may be stored, and how many may not: groups, or elements where no moment is companded."""
    if SPEC.companded:
        units = tl.max(bad, axis=1)
        good, kept = (units == 0)[:, None], tl.sum(units, axis=0)  # the same along a group: accesses stay wide
    else:
        good, kept = bad == 0, tl.sum(tl.sum(bad, axis=1), axis=0)
    return good, kept


@triton.jit
def shared_moment(fields, begin, inside, SPEC: tl.constexpr):
    """Load the second moments that groups share.

    A group lies in one row. Mostly it needs one value, or neighbours in a row of them; in a convolution kernel it may
    need any.
    """
    lane = tl.arange(0, SPEC.width)[None, :]
    shared, inner, cols = tl.load(fields + t.SHARED), tl.load(fields + t.INNER), tl.load(fields + t.COLS)
    moments = tl.load(fields + t.SCRATCH).to(tl.pointer_type(tl.float32))
    if (inner >= cols) | ((inner == 1) & (shared >= cols)):
        first = begin // (shared * inner) * inner + begin % inner
        at = first[:, None] + tl.where(inner > 1, lane, 0)
    else:
        element = begin[:, None] + lane
        at = element // (shared * inner) * inner + element % inner
    return tl.load(moments + at, mask=inside, other=0.0)


@triton.jit
def blocks_of(here, row, first, size, cols, SPEC: tl.constexpr):
    """The weights under the folded moments that `places` found: their number per moment, offsets, which are inside."""
    BLOCK: tl.constexpr = SPEC.block
    TALL: tl.constexpr = SPEC.count * SPEC.width
    lane = tl.arange(0, BLOCK)[None, :]
    if SPEC.whole:
        length = tl.full([TALL], BLOCK, tl.int32)
        offset = tl.reshape(here[1], [TALL])[:, None] * BLOCK + lane
        inside = tl.reshape(here[2], [TALL])[:, None] & (lane < BLOCK)
    else:
        begin = tl.arange(0, SPEC.width)[None, :] * BLOCK
        left = tl.minimum(size * BLOCK, cols - first * BLOCK).to(tl.int32)  # of the row, for this group
        length = tl.reshape(tl.minimum(left[:, None] - begin, BLOCK), [TALL])
        offset = tl.reshape((row * cols + first * BLOCK)[:, None] + begin, [TALL])[:, None] + lane
        inside = lane < length[:, None]
    return length, offset, inside
