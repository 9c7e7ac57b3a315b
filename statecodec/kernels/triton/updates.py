"""One tile of a fused step: decode, apply the rule, encode. Also the two tables that a launch works from."""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.triton.companding import group_bounds, inside_groups
from statecodec.kernels.triton.folding import tree_sum
from statecodec.kernels.triton.steps import (
    average,
    direction,
    load_gradient,
    load_state,
    load_weight,
    pointer,
    sign,
    store_state,
    store_weight,
)

# Columns of the table of parameters (int64), one row each. Addresses come first. OUTER x SHARED x INNER is the
# parameter as a shared second moment sees it: one value per outer and inner index.
PARAM, LOW, GRAD, M_DATA, M_SCALES, V_DATA, V_SCALES, STEP, SKIPPED = map(tl.constexpr, range(9))
ROWS, COLS, PROBES, TILES, INDEX, FLAT, OUTER, SHARED, INNER, SCRATCH = map(tl.constexpr, range(9, 19))
FIELDS = tl.constexpr(19)

# Columns of the bookkeeping (int32), one row per parameter: probes done so far, found unusable, launch whose gate is
# open, whether to step, dither key; then the scalars of this step as fp32 bits: decay, step size, root, 1 / root, gain.
DONE, BAD, GATE, ACTIVE, KEY, DECAY, STEP_SIZE, ROOT, RECIPROCAL, GAIN = map(tl.constexpr, range(10))
MARKS = tl.constexpr(16)


@triton.jit
def scalar(mark, FIELD: tl.constexpr):
    """One of the scalars of this step."""
    return tl.load(mark + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def places(rows, cols, start, GROUP: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """Where COUNT groups from `start` on lie in a rows x cols state: groups, elements, bytes of nibbles, and what is
    inside.

    WHOLE: the groups tile flat memory and their number of elements is a multiple of 16, so that accesses can be wide.
    """
    lane, pair = tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    if WHOLE:  # whole groups follow each other through the rows: the state is one row to this code
        numel = tl.multiple_of(rows * cols, 16)
        index = start + tl.arange(0, COUNT)
        begin = index * WIDTH
        size = tl.minimum(numel - begin, WIDTH)
        offset = begin[:, None] + lane[None, :]
        inside = offset < numel
        packed = index[:, None] * (WIDTH // 2) + pair[None, :]
        packed_inside = packed < tl.multiple_of(rows * cols // 2, 8)
    else:
        groups = (cols + GROUP - 1) // GROUP
        index, begin, size = group_bounds(rows, cols, groups, start, GROUP, COUNT, False)
        offset = begin[:, None] + lane[None, :]
        inside = inside_groups(lane, size, False)
        row = index // groups
        packed = (row * ((cols + 1) // 2) + (begin - row * cols) // 2)[:, None] + pair[None, :]
        packed_inside = inside_groups(2 * pair, size, False)
    return index, begin, offset, inside, packed, packed_inside, size


@triton.jit
def update_tile(
    row, mark, start, m_table, v_table, beta1, one_beta1, beta2, one_beta2, eps, l2, momentum,
    METHOD: tl.constexpr, KIND: tl.constexpr, LOW_BITS: tl.constexpr, GRAD_KIND: tl.constexpr, M: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr, MAXIMIZE: tl.constexpr,
    L2: tl.constexpr, NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """COUNT groups, from `start` on, of a parameter whose first moment has its shape: adam, lion, sgd, slim."""
    param, low, grad = tl.load(row + PARAM), tl.load(row + LOW), tl.load(row + GRAD)
    m_data, m_scales = tl.load(row + M_DATA), tl.load(row + M_SCALES)
    v_data, v_scales = tl.load(row + V_DATA), tl.load(row + V_SCALES)
    index, begin, offset, inside, packed, packed_inside, size = places(
        tl.load(row + ROWS), tl.load(row + COLS), start, GROUP, WIDTH, COUNT, WHOLE
    )
    g = load_gradient(grad, offset, inside, GRAD_KIND, WHOLE)
    w = load_weight(param, low, offset, inside, KIND, LOW_BITS, WHOLE)
    decay, step = scalar(mark, DECAY), scalar(mark, STEP_SIZE)
    if MAXIMIZE:
        g = -g
    if L2:
        g = tl.fma(w, l2, g)  # torch's add(alpha=) is a fused operation, on CPUs and on GPUs
    if M[0] != 0:
        m = load_state(
            m_data, m_scales, m_table, index, offset, inside, packed, packed_inside, size, M, COUNT, WIDTH, WHOLE
        )
    if METHOD == "adam":
        v = load_state(
            v_data, v_scales, v_table, index, offset, inside, packed, packed_inside, size, V, COUNT, WIDTH, WHOLE
        )
        m = average(m, g, one_beta1)
        v = v * beta2 + one_beta2 * g * g
        w = w * decay - step * direction(m, v, scalar(mark, ROOT), scalar(mark, RECIPROCAL), eps)
        store_state(v, v_data, v_scales, index, offset, inside, packed, packed_inside, size, V, COUNT, WIDTH, WHOLE)
    elif METHOD == "slim":
        m = average(m, g, one_beta1)
        v = _shared_moment(v_data, begin, size, inside, row, WIDTH)
        w = w * decay - step * direction(m, v, scalar(mark, ROOT), scalar(mark, RECIPROCAL), eps)
    elif METHOD == "lion":
        w = w * decay - step * sign(average(g, m, beta1))
        m = average(m, g, one_beta2)
    elif M[0] == 0:
        w = tl.fma(g, -step, w * decay)
    else:
        m = m * momentum + scalar(mark, GAIN) * g
        if NESTEROV:
            w = w * decay - step * (g + momentum * m)
        else:
            w = w * decay - step * m
    if M[0] != 0:
        store_state(m, m_data, m_scales, index, offset, inside, packed, packed_inside, size, M, COUNT, WIDTH, WHOLE)
    key = tl.load(mark + KEY).to(tl.uint32, bitcast=True)
    store_weight(w, param, low, offset, inside, offset, key, KIND, LOW_BITS, STOCHASTIC, WHOLE)


@triton.jit
def _shared_moment(v_data, begin, size, inside, row, WIDTH: tl.constexpr):
    """Second moments that groups share. A group lies in one row: mostly it needs one value, or neighbours in a row of
    them; in a kernel of a convolution it may need any."""
    shared, inner, cols = tl.load(row + SHARED), tl.load(row + INNER), tl.load(row + COLS)
    if (inner >= cols) | ((inner == 1) & (shared >= cols)):
        first = (begin // (shared * inner)) * inner + begin % inner
        at = first[:, None] + tl.where(inner > 1, tl.arange(0, WIDTH), 0)[None, :]
    else:
        place = begin[:, None] + tl.arange(0, WIDTH)[None, :]
        at = place // (shared * inner) * inner + place % inner
    # Written in this very launch, by whoever opened the gate: read from the cache that all multiprocessors share.
    return tl.load(
        pointer(v_data, tl.float32, False) + at, mask=inside & (size > 0)[:, None], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip


@triton.jit
def update_folded(
    row, mark, start, m_table, v_table, one_beta1, beta2, one_beta2, eps, residual,
    KIND: tl.constexpr, LOW_BITS: tl.constexpr, GRAD_KIND: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr, MEAN_OF_SQUARES: tl.constexpr, TRUE_TAIL: tl.constexpr, DECAY_FIRST: tl.constexpr,
):  # fmt: skip
    """COUNT groups of folded moments, from `start` on, and the WIDTH blocks of BLOCK weights that each of them stands
    for (FOAM)."""
    param, low, grad = tl.load(row + PARAM), tl.load(row + LOW), tl.load(row + GRAD)
    m_data, m_scales = tl.load(row + M_DATA), tl.load(row + M_SCALES)
    v_data, v_scales = tl.load(row + V_DATA), tl.load(row + V_SCALES)
    rows, cols = tl.load(row + ROWS), tl.load(row + COLS)
    blocks = (cols + BLOCK - 1) // BLOCK
    index, _, at, at_inside, packed, packed_inside, size = places(rows, blocks, start, GROUP, WIDTH, COUNT, WHOLE)
    TALL: tl.constexpr = COUNT * WIDTH
    line, lane = tl.arange(0, TALL), tl.arange(0, BLOCK)
    if WHOLE:
        count = tl.full([TALL], BLOCK, tl.int64)
        offset = (start * WIDTH + line)[:, None] * BLOCK + lane[None, :]
        inside = offset < tl.multiple_of(rows * cols, 16)
    else:
        groups = (blocks + GROUP - 1) // GROUP
        group, within = start + line // WIDTH, line % WIDTH
        block = (group % groups) * GROUP + within
        here = (group // groups < rows) & (within < GROUP) & (block < blocks)
        count = tl.where(here, tl.minimum(cols - block * BLOCK, BLOCK), 0)
        offset = ((group // groups) * cols + block * BLOCK)[:, None] + lane[None, :]
        inside = lane[None, :] < count[:, None]
    g = load_gradient(grad, offset, inside, GRAD_KIND, WHOLE)
    w = load_weight(param, low, offset, inside, KIND, LOW_BITS, WHOLE)
    if MAXIMIZE:
        g = -g
    divisor = tl.where(count > 0, count, 1).to(tl.float32) if TRUE_TAIL else tl.full([TALL], BLOCK, tl.float32)
    mean = tl.div_rn(tree_sum(g, TALL, BLOCK), divisor)
    square = tl.div_rn(tree_sum(g * g, TALL, BLOCK), divisor) if MEAN_OF_SQUARES else mean * mean
    m = load_state(m_data, m_scales, m_table, index, at, at_inside, packed, packed_inside, size, M, COUNT, WIDTH, WHOLE)
    v = load_state(v_data, v_scales, v_table, index, at, at_inside, packed, packed_inside, size, V, COUNT, WIDTH, WHOLE)
    m = average(m, tl.reshape(mean, [COUNT, WIDTH]), one_beta1)
    v = v * beta2 + one_beta2 * tl.reshape(square, [COUNT, WIDTH])
    rest = residual * (g - mean[:, None])
    numerator = tl.reshape(m, [TALL])[:, None] + rest
    size_of = rest * rest + tl.reshape(v, [TALL])[:, None]
    decay = scalar(mark, DECAY)
    change = scalar(mark, STEP_SIZE) * direction(numerator, size_of, scalar(mark, ROOT), scalar(mark, RECIPROCAL), eps)
    w = w * decay - change if DECAY_FIRST else (w - change) * decay
    store_state(m, m_data, m_scales, index, at, at_inside, packed, packed_inside, size, M, COUNT, WIDTH, WHOLE)
    store_state(v, v_data, v_scales, index, at, at_inside, packed, packed_inside, size, V, COUNT, WIDTH, WHOLE)
    key = tl.load(mark + KEY).to(tl.uint32, bitcast=True)
    store_weight(w, param, low, offset, inside, offset, key, KIND, LOW_BITS, STOCHASTIC, WHOLE)
