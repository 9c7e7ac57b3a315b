"""The fused step of everything that `fast` does not take: any weight, any supported state, any shape, any address.

Each program steps a run of tiles of one parameter; a tile is [groups, lanes], element by element. The rules are those
of `reference.steps`, in the order of operations of `cpu.steps`, every operation rounded separately.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.triton import tables as t
from statecodec.kernels.triton.companding import group_bounds, magnitude_bits
from statecodec.kernels.triton.folding import tree_sum
from statecodec.kernels.triton.scalars import entry
from statecodec.kernels.triton.stored import load_gradient, load_state, load_weight, store_state, store_weight

_TOO_LARGE, _TOO_LARGE_FP16 = tl.constexpr((127 + 64) << 23), tl.constexpr(0x477FF000)  # bits of LARGEST, LARGEST_FP16


@triton.jit
def step_elements(news, table, chunks, scalars, m_table, v_table, count: tl.int64, SPEC: tl.constexpr):
    """One chunk: SPEC.run tiles of SPEC.count groups, from the first of the chunk on."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    at, first = tl.load(chunk).to(tl.int64), tl.load(chunk + 1)
    mine, known, gradient = table + at, scalars + at, tl.load(news + at)
    if gradient != 0:
        tiles = (entry(mine, count, t.GROUPS) + SPEC.count - 1) // SPEC.count
        tiles = tl.minimum(tiles.to(tl.int32) - first, SPEC.run)
        for tile in range(tiles):
            start = (first + tile).to(tl.int64) * SPEC.count
            if SPEC.method == "foam":
                step_folded(gradient, mine, known, m_table, v_table, count, start, SPEC)
            else:
                step_tile(gradient, mine, known, m_table, v_table, count, start, SPEC)


@triton.jit
def step_tile(gradient, mine, known, m_table, v_table, count, start, SPEC: tl.constexpr):
    """The groups from `start` on of a parameter whose first moment has its shape: adam, lion, sgd, slim."""
    M: tl.constexpr = SPEC.m
    V: tl.constexpr = SPEC.v
    param, low = entry(mine, count, t.PARAM), entry(mine, count, t.LOW)
    m_data, m_scales = entry(mine, count, t.M_DATA), entry(mine, count, t.M_SCALES)
    v_data, v_scales = entry(mine, count, t.V_DATA), entry(mine, count, t.V_SCALES)
    here, begin = places(entry(mine, count, t.ROWS), entry(mine, count, t.COLS), start, SPEC)
    offset, inside = here[1], here[2]
    decay, size = entry(known, count, t.DECAY_BY), entry(known, count, t.SIZE)
    w = load_weight(param, low, offset, inside, SPEC)
    g = load_gradient(gradient, offset, inside, SPEC)
    if SPEC.l2:
        g = tl.fma(w, entry(known, count, t.L2_DECAY), g)  # torch's add(alpha=) is a fused operation
    if M.kind != "absent":
        m = load_state(m_data, m_scales, m_table, here, M, SPEC)
    if SPEC.method == "adam" or SPEC.method == "slim":
        m = average(m, g, entry(known, count, t.RATE_1))
        if SPEC.method == "adam":
            v = load_state(v_data, v_scales, v_table, here, V, SPEC)
            v = v * entry(known, count, t.KEEP_2) + entry(known, count, t.RATE_2) * g * g
        else:
            v = shared_moment(mine, count, begin, inside, SPEC)
        w = w * decay - size * direction(m, v, known, count)
    elif SPEC.method == "lion":
        w = w * decay - size * sign(average(g, m, entry(known, count, t.KEEP_1)))
        m = average(m, g, entry(known, count, t.RATE_2))
    elif M.kind == "absent":
        w = tl.fma(g, 0.0 - size, w * decay)
    else:
        heavy = entry(known, count, t.HEAVY)
        m = m * heavy + entry(known, count, t.GAIN) * g
        if SPEC.nesterov:
            w = w * decay - size * (g + heavy * m)
        else:
            w = w * decay - size * m
    bad = weight_too_large(w, SPEC)
    if M.kind != "absent":
        bad = bad | too_large(m)
    if V.kind != "absent":
        bad = bad | too_large(v)
    bad = (bad & inside).to(tl.int32)
    if M.kind == "companded" or V.kind == "companded":  # the unit is the group, else the element
        units = tl.max(bad, axis=1)
        kept = tl.sum(units, axis=0)
        good = (units == 0)[:, None]  # the same along a group, which keeps accesses wide
    else:
        kept = tl.sum(tl.sum(bad, axis=1), axis=0)
        good = bad == 0
    if M.kind != "absent":
        store_state(m, m_data, m_scales, here, good, M, SPEC)
    if SPEC.method == "adam":
        store_state(v, v_data, v_scales, here, good, V, SPEC)
    store_weight(w, param, low, offset, inside & good, key(known, count, SPEC), SPEC)
    count_kept(mine, count, kept)


@triton.jit
def step_folded(gradient, mine, known, m_table, v_table, count, start, SPEC: tl.constexpr):
    """Groups of folded moments from `start` on, and the blocks of weights that each of them stands for (FOAM)."""
    M: tl.constexpr = SPEC.m
    V: tl.constexpr = SPEC.v
    COUNT: tl.constexpr = SPEC.count
    WIDTH: tl.constexpr = SPEC.width
    BLOCK: tl.constexpr = SPEC.block
    TALL: tl.constexpr = COUNT * WIDTH
    param, low = entry(mine, count, t.PARAM), entry(mine, count, t.LOW)
    m_data, m_scales = entry(mine, count, t.M_DATA), entry(mine, count, t.M_SCALES)
    v_data, v_scales = entry(mine, count, t.V_DATA), entry(mine, count, t.V_SCALES)
    rows, cols = entry(mine, count, t.ROWS), entry(mine, count, t.COLS)
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
    m = average(m, tl.reshape(mean, [COUNT, WIDTH]), entry(known, count, t.RATE_1))
    v = v * entry(known, count, t.KEEP_2) + entry(known, count, t.RATE_2) * tl.reshape(square, [COUNT, WIDTH])
    rest = entry(known, count, t.REST) * (g - mean[:, None])
    numerator = tl.reshape(m, [TALL])[:, None] + rest
    second = rest * rest + tl.reshape(v, [TALL])[:, None]
    decay = entry(known, count, t.DECAY_BY)
    change = entry(known, count, t.SIZE) * direction(numerator, second, known, count)
    if SPEC.decay_first:
        w = w * decay - change
    else:
        w = (w - change) * decay
    bad = tl.reshape(tl.max((weight_too_large(w, SPEC) & inside).to(tl.int32), axis=1), [COUNT, WIDTH])
    bad = bad | ((too_large(m) | too_large(v)) & here[2]).to(tl.int32)
    if M.kind == "companded" or V.kind == "companded":  # the unit is the group of blocks, else the block
        units = tl.max(bad, axis=1)
        kept = tl.sum(units, axis=0)
        good = (units == 0)[:, None]
    else:
        kept = tl.sum(tl.sum(bad, axis=1), axis=0)
        good = bad == 0
    store_state(m, m_data, m_scales, here, good, M, SPEC)
    store_state(v, v_data, v_scales, here, good, V, SPEC)
    good = tl.reshape(tl.broadcast_to(good, [COUNT, WIDTH]), [TALL])[:, None]
    store_weight(w, param, low, offset, inside & good, key(known, count, SPEC), SPEC)
    count_kept(mine, count, kept)


# --- the rules' pieces


@triton.jit
def average(m, g, rate):
    """The exponential average: m + rate * (g - m)."""
    return m + rate * (g - m)


@triton.jit
def direction(m, v, known, count):
    """m / (sqrt(v) / root + eps)."""
    root, reciprocal = entry(known, count, t.ROOT), entry(known, count, t.RECIPROCAL)
    s = tl.sqrt_rn(v)
    quotient = s * reciprocal  # by one number of many others: see `companding.ratio`
    quotient = tl.fma(tl.fma(-quotient, root, s), reciprocal, quotient)
    return tl.div_rn(m, quotient + entry(known, count, t.EPSILON))


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def too_large(x):
    """Whether a new value may not be stored: NaN, infinite, or not below LARGEST."""
    return magnitude_bits(x) >= _TOO_LARGE


@triton.jit
def weight_too_large(w, SPEC: tl.constexpr):
    """Whether a new weight may not be stored; fp16 holds less."""
    if SPEC.weight == "fp16":
        wrong = magnitude_bits(w) >= _TOO_LARGE_FP16
    else:
        wrong = too_large(w)
    return wrong


@triton.jit
def count_kept(mine, count, kept):
    """Count the units that kept their old bytes."""
    if kept > 0:
        counter = entry(mine, count, t.SKIPPED).to(tl.pointer_type(tl.float32))
        tl.atomic_add(counter, kept.to(tl.float32), sem="relaxed")


@triton.jit
def key(known, count, SPEC: tl.constexpr):
    """The dither's key, as uint32."""
    found = tl.zeros([], tl.uint32)
    if SPEC.stochastic:
        found = entry(known, count, t.KEY).to(tl.uint32, bitcast=True)
    return found


@triton.jit
def shared_moment(mine, count, begin, inside, SPEC: tl.constexpr):
    """Second moments that groups share. A group lies in one row: mostly it needs one value, or neighbours in a row of
    them; in a kernel of a convolution it may need any."""
    lane = tl.arange(0, SPEC.width)[None, :]
    shared, inner, cols = entry(mine, count, t.SHARED), entry(mine, count, t.INNER), entry(mine, count, t.COLS)
    moments = entry(mine, count, t.SCRATCH).to(tl.pointer_type(tl.float32))
    if (inner >= cols) | ((inner == 1) & (shared >= cols)):
        first = begin // (shared * inner) * inner + begin % inner
        at = first[:, None] + tl.where(inner > 1, lane, 0)
    else:
        place = begin[:, None] + lane
        at = place // (shared * inner) * inner + place % inner
    return tl.load(moments + at, mask=inside, other=0.0)


# --- where things lie


@triton.jit
def places(rows, cols, start, SPEC: tl.constexpr):
    """Where the groups from `start` on lie in a rows x cols state: their index, elements, which are inside, bytes of
    nibbles, which are inside, and whether the group exists; and where each group begins."""
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
