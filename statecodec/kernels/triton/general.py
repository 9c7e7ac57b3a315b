"""The fused step of whatever `fast` does not support: any weight, any supported state, any shape, any address.

Each program steps a run of tiles of one parameter; a tile is [groups, lanes], element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.triton import tables as t
from statecodec.kernels.triton.companding import group_bounds
from statecodec.kernels.triton.folding import tree_sum
from statecodec.kernels.triton.rules import average, direction, stepped, too_large, weight_too_large
from statecodec.kernels.triton.scalars import addresses_of, entry, group_numbers, own_chunk, parameter_numbers
from statecodec.kernels.triton.stored import load_gradient, load_state, load_weight, store_state, store_weight


@triton.jit
def step_elements(news, table, chunks, scalars, m_table, v_table, count: tl.int64, SPEC: tl.constexpr):
    """One chunk: SPEC.run tiles of SPEC.count groups, from the first of the chunk on."""
    at, first = own_chunk(chunks)
    fields, scalar_fields, gradient = table + at, scalars + at, tl.load(news + at)
    if gradient != 0:
        common = group_numbers(news, count)
        tiles = (entry(fields, count, t.GROUPS) + SPEC.count - 1) // SPEC.count
        tiles = tl.minimum(tiles.to(tl.int32) - first, SPEC.run)
        for tile in range(tiles):
            start = (first + tile).to(tl.int64) * SPEC.count
            numbers = (
                parameter_numbers(scalar_fields, count),
                common,
            )  # read for each tile: kept in registers, Lion's step would spill
            if SPEC.method == "foam":
                kept = step_folded(gradient, fields, scalar_fields, numbers, m_table, v_table, count, start, SPEC)
            else:
                kept = step_tile(gradient, fields, scalar_fields, numbers, m_table, v_table, count, start, SPEC)
            if kept > 0:
                skipped = entry(fields, count, t.SKIPPED).to(tl.pointer_type(tl.float32))
                tl.atomic_add(skipped, kept.to(tl.float32), sem="relaxed")


@triton.jit
def step_tile(gradient, fields, scalar_fields, numbers, m_table, v_table, count, start, SPEC: tl.constexpr):
    """Step the groups from `start` on of a parameter whose first moment has its shape: adam, lion, sgd, slim.

    Returns how many units kept their old bytes.
    """
    M: tl.constexpr = SPEC.m  # triton 3.6 passes on constants only under a name
    V: tl.constexpr = SPEC.v
    param, low, m_data, m_scales, v_data, v_scales = addresses_of(fields, count)
    here, begin = places(entry(fields, count, t.ROWS), entry(fields, count, t.COLS), start, SPEC)
    offset, inside = here[1], here[2]
    if SPEC.method == "slim":  # while few registers are taken
        v = shared_moment(fields, count, begin, inside, SPEC)
    w = load_weight(param, low, offset, inside, SPEC)
    g = load_gradient(gradient, offset, inside, SPEC)
    m = g
    if SPEC.m.kind != "absent":
        m = load_state(m_data, m_scales, m_table, here, M, SPEC)
    if SPEC.method == "adam":
        v = load_state(v_data, v_scales, v_table, here, V, SPEC)
    elif SPEC.method != "slim":
        v = g
    w, m, v = stepped(w, g, m, v, numbers, SPEC)
    bad = weight_too_large(w, SPEC)
    if SPEC.m.kind != "absent":
        bad = bad | too_large(m)
    if SPEC.v.kind != "absent":
        bad = bad | too_large(v)
    good, kept = judged((bad & inside).to(tl.int32), SPEC)
    if SPEC.m.kind != "absent":
        store_state(m, m_data, m_scales, here, good, M, SPEC)
    if SPEC.method == "adam":
        store_state(v, v_data, v_scales, here, good, V, SPEC)
    store_weight(w, param, low, offset, inside & good, entry(scalar_fields, count, t.KEY), SPEC)
    return kept


@triton.jit
def step_folded(gradient, fields, scalar_fields, numbers, m_table, v_table, count, start, SPEC: tl.constexpr):
    """Groups of folded moments from `start` on, and the blocks of weights that each of them stands for (FOAM)."""
    COUNT: tl.constexpr = SPEC.count
    WIDTH: tl.constexpr = SPEC.width
    BLOCK: tl.constexpr = SPEC.block
    TALL: tl.constexpr = COUNT * WIDTH
    M: tl.constexpr = SPEC.m  # triton 3.6 passes on constants only under a name
    V: tl.constexpr = SPEC.v
    param, low, m_data, m_scales, v_data, v_scales = addresses_of(fields, count)
    of_param, common = numbers
    decay, size, root, reciprocal, _gain = of_param
    _keep_1, rate_1, keep_2, rate_2, eps, _l2, _heavy, residual = common
    rows, cols = entry(fields, count, t.ROWS), entry(fields, count, t.COLS)
    blocks = (cols + BLOCK - 1) // BLOCK
    here, _ = places(rows, blocks, start, SPEC)
    length, offset, inside = blocks_of(rows, cols, blocks, start, SPEC)
    w = load_weight(param, low, offset, inside, SPEC)
    g = load_gradient(gradient, offset, inside, SPEC)
    divisor = tl.full([TALL], BLOCK, tl.float32)
    if SPEC.true_tail:
        divisor = tl.where(length > 0, length, 1).to(tl.float32)
    mean = tl.div_rn(tree_sum(g, TALL, BLOCK), divisor)
    if SPEC.mean_of_squares:
        square = tl.div_rn(tree_sum(g * g, TALL, BLOCK), divisor)
    else:
        square = mean * mean
    m = load_state(m_data, m_scales, m_table, here, M, SPEC)
    v = load_state(v_data, v_scales, v_table, here, V, SPEC)
    m = average(m, tl.reshape(mean, [COUNT, WIDTH]), rate_1)
    v = v * keep_2 + rate_2 * tl.reshape(square, [COUNT, WIDTH])
    rest = residual * (g - mean[:, None])
    numerator = tl.reshape(m, [TALL])[:, None] + rest
    second = rest * rest + tl.reshape(v, [TALL])[:, None]
    change = size * direction(numerator, second, root, reciprocal, eps, False)
    if SPEC.decay_first:
        w = w * decay - change
    else:
        w = (w - change) * decay
    bad = tl.reshape(tl.max((weight_too_large(w, SPEC) & inside).to(tl.int32), axis=1), [COUNT, WIDTH])
    good, kept = judged(bad | ((too_large(m) | too_large(v)) & here[2]).to(tl.int32), SPEC)
    store_state(m, m_data, m_scales, here, good, M, SPEC)
    store_state(v, v_data, v_scales, here, good, V, SPEC)
    good = tl.reshape(tl.broadcast_to(good, [COUNT, WIDTH]), [TALL])[:, None]
    store_weight(w, param, low, offset, inside & good, entry(scalar_fields, count, t.KEY), SPEC)
    return kept


@triton.jit
def judged(bad, SPEC: tl.constexpr):
    """Which units may be stored, and how many may not: groups, or elements where no moment is companded."""
    if SPEC.m.kind == "companded" or SPEC.v.kind == "companded":
        units = tl.max(bad, axis=1)
        good, kept = (units == 0)[:, None], tl.sum(units, axis=0)  # the same along a group: accesses stay wide
    else:
        good, kept = bad == 0, tl.sum(tl.sum(bad, axis=1), axis=0)
    return good, kept


@triton.jit
def shared_moment(fields, count, begin, inside, SPEC: tl.constexpr):
    """Load the second moments that groups share.

    A group lies in one row. Mostly it needs one value, or neighbours in a row of them; in a convolution kernel it may
    need any.
    """
    lane = tl.arange(0, SPEC.width)[None, :]
    shared, inner, cols = entry(fields, count, t.SHARED), entry(fields, count, t.INNER), entry(fields, count, t.COLS)
    moments = entry(fields, count, t.SCRATCH).to(tl.pointer_type(tl.float32))
    if (inner >= cols) | ((inner == 1) & (shared >= cols)):
        first = begin // (shared * inner) * inner + begin % inner
        at = first[:, None] + tl.where(inner > 1, lane, 0)
    else:
        element = begin[:, None] + lane
        at = element // (shared * inner) * inner + element % inner
    return tl.load(moments + at, mask=inside, other=0.0)


# --- offsets and masks


@triton.jit
def places(rows, cols, start, SPEC: tl.constexpr):
    """Where the groups from `start` on lie in a rows x cols state.

    Returns their index, elements, which are inside, bytes of nibbles, which are inside, whether the group exists; and
    where each group begins.
    """
    WIDTH: tl.constexpr = SPEC.width
    COUNT: tl.constexpr = SPEC.count
    lane, pair = tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    if SPEC.whole:  # whole groups follow each other through the rows: the state is one row to this code
        numel = tl.multiple_of(rows * cols, 16)
        index = start + tl.arange(0, COUNT)
        begin = index * WIDTH
        size = tl.minimum(numel - begin, WIDTH)
        offset = begin[:, None] + lane[None, :]
        inside = offset < numel
        packed = index[:, None] * (WIDTH // 2) + pair[None, :]
        packed_inside = packed < tl.multiple_of(rows * cols // 2, 8)
    else:
        groups = (cols + SPEC.group - 1) // SPEC.group
        index, begin, size = group_bounds(rows, cols, groups, start, SPEC.group, COUNT, False)
        offset = begin[:, None] + lane[None, :]
        inside = lane[None, :] < size[:, None]
        row = index // groups
        packed = (row * ((cols + 1) // 2) + (begin - row * cols) // 2)[:, None] + pair[None, :]
        packed_inside = (2 * pair)[None, :] < size[:, None]
    return (index, offset, inside, packed, packed_inside, size > 0), begin


@triton.jit
def blocks_of(rows, cols, blocks, start, SPEC: tl.constexpr):
    """The weights under the folded moments from group `start` on: per block its length; offsets, which are inside."""
    WIDTH: tl.constexpr = SPEC.width
    BLOCK: tl.constexpr = SPEC.block
    TALL: tl.constexpr = SPEC.count * SPEC.width
    line, lane = tl.arange(0, TALL), tl.arange(0, BLOCK)
    if SPEC.whole:
        length = tl.full([TALL], BLOCK, tl.int64)
        offset = (start * WIDTH + line)[:, None] * BLOCK + lane[None, :]
        inside = offset < tl.multiple_of(rows * cols, 16)
    else:
        groups = (blocks + SPEC.group - 1) // SPEC.group
        group, within = start + line // WIDTH, line % WIDTH
        block = (group % groups) * SPEC.group + within
        here = (group // groups < rows) & (within < SPEC.group) & (block < blocks)
        length = tl.where(here, tl.minimum(cols - block * BLOCK, BLOCK), 0)
        offset = ((group // groups) * cols + block * BLOCK)[:, None] + lane[None, :]
        inside = lane[None, :] < length[:, None]
    return length, offset, inside
