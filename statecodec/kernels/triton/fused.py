"""Fused steps: a whole parameter group in one launch, every stored byte read once and written once.

The launch is a list of work items (`plan.schedule`), two kinds per parameter, handed out in order by a ticket:

* probe: look for gradient elements that are NaN or beyond LARGEST_GRADIENT. The last probe of a parameter to finish begins its
  step: it counts (`step` or `skipped`), computes the scalars that depend on the step count, and opens the gate.
* update: wait for the gate, then decode, step and encode one tile, unless the gate says skip.

A parameter's probes stand before its updates, and a ticket is taken only by a program that is running: what an update waits for is
always under way, so the wait ends whatever order the hardware starts programs in. Nothing is reset between launches: tickets
count on, and the gate holds the launch's number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.fused import LARGEST_GRADIENT
from statecodec.kernels.triton.companding import group_bounds, inside_groups, magnitude_bits
from statecodec.kernels.triton.steps import (
    average,
    direction,
    dither_key,
    load_gradient,
    load_state,
    load_weight,
    sign,
    store_state,
    store_weight,
)

# Columns of the table of parameters (int64), one row each.
PARAM, LOW, GRAD, M_DATA, M_SCALES, V_DATA, V_SCALES, STEP, SKIPPED, ROWS, COLS, PROBES, INDEX, FLAT = map(
    tl.constexpr, range(14)
)
FIELDS = tl.constexpr(14)
# Columns of the bookkeeping (int32), one row per parameter: probes done so far, found unusable, launch whose gate is open, whether
# to step, dither key; then the scalars of this step as fp32 bits: decay, step size, root, 1 / root, gain.
DONE, BAD, GATE, ACTIVE, KEY, DECAY, STEP_SIZE, ROOT, RECIPROCAL, GAIN = map(tl.constexpr, range(10))
MARKS = tl.constexpr(16)

_LIMIT = tl.constexpr((127 + 60) << 23)  # bits of LARGEST_GRADIENT
assert LARGEST_GRADIENT == 2.0**60


@triton.jit
def _bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _scalar(mark, FIELD: tl.constexpr):
    return tl.load(mark + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64 by repeated squaring, for an integer 0 <= exponent < 2**25 (fp32 counts no further)."""
    result = base * 0.0 + 1.0
    for bit in tl.static_range(25):
        result = tl.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


@triton.jit
def _largest(grad, numel, chunk, KIND: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, ALIGNED: tl.constexpr):
    """The largest magnitude, as bits, in a chunk of CHUNKS * TILE gradient elements."""
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    largest = tl.zeros([TILE], tl.int32)
    for part in tl.static_range(CHUNKS):
        offset = (chunk * CHUNKS + part) * TILE + tl.arange(0, TILE)
        largest = tl.maximum(largest, magnitude_bits(load_gradient(grad, offset, offset < numel, KIND, ALIGNED)))
    return tl.max(largest, axis=0)


@triton.jit
def _begin(
    row, mark, lr, decay, beta1, beta2, dampening, scale, seed, METHOD: tl.constexpr, DECAY_FIRST: tl.constexpr,
    TORCH_BIAS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Count a step or a skip, and leave the scalars of the step. All float64; rounded to fp32 once, as a host would."""
    bad = tl.atomic_xchg(mark + BAD, 0)
    counter = tl.load(row + tl.where(bad != 0, SKIPPED, STEP)).to(tl.pointer_type(tl.float32))
    t = tl.load(counter) + 1.0
    tl.store(counter, t)
    tl.store(mark + ACTIVE, (bad == 0).to(tl.int32))
    c1 = 1.0 - _power(beta1, t.to(tl.int32))
    root = tl.sqrt(1.0 - _power(beta2, t.to(tl.int32)))
    size = lr
    gain = lr * 0.0 + 1.0
    if METHOD == "adam" or METHOD == "shared_adam" or METHOD == "foam":
        size = lr / c1
    if METHOD == "foam":
        size = lr * scale / c1
        if not TORCH_BIAS:
            size = lr * scale * root / c1
            root = root * 0.0 + 1.0
    if METHOD == "sgd":
        gain = tl.where(t == 1.0, 1.0, 1.0 - dampening)
    tl.store(mark + DECAY, _bits(1.0 - lr * decay))
    tl.store(mark + STEP_SIZE, _bits(size))
    tl.store(mark + GAIN, _bits(gain))
    divisor = root.to(tl.float32)
    tl.store(mark + ROOT, _bits(divisor))
    tl.store(mark + RECIPROCAL, _bits(tl.div_rn(tl.full((), 1.0, tl.float32), divisor)))
    if STOCHASTIC:
        key = dither_key(seed, tl.load(row + INDEX), t.to(tl.int32))
        tl.store(mark + KEY, key.to(tl.int32, bitcast=True))


@triton.jit
def _probe(
    row, mark, epoch, chunk, lr, decay, beta1, beta2, dampening, scale, seed, METHOD: tl.constexpr, GRAD_KIND: tl.constexpr,
    TILE: tl.constexpr, CHUNKS: tl.constexpr, PATHS: tl.constexpr, DECAY_FIRST: tl.constexpr, TORCH_BIAS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    grad = tl.load(row + GRAD)
    numel = tl.load(row + ROWS) * tl.load(row + COLS)
    whole = PATHS == 1
    if PATHS == 3:
        whole = tl.load(row + FLAT) != 0
    if whole:
        largest = _largest(grad, numel, chunk, GRAD_KIND, TILE, CHUNKS, True)
    else:
        largest = _largest(grad, numel, chunk, GRAD_KIND, TILE, CHUNKS, False)
    if largest > _LIMIT:
        tl.atomic_or(mark + BAD, 1)
    tl.debug_barrier()  # what this program found goes out before it is counted as done
    done = tl.atomic_add(mark + DONE, 1, sem="acq_rel") + 1
    if done % tl.load(row + PROBES).to(tl.int32) == 0:
        _begin(
            row, mark, lr, decay, beta1, beta2, dampening, scale, seed, METHOD, DECAY_FIRST, TORCH_BIAS, STOCHASTIC
        )
        tl.debug_barrier()
        tl.atomic_xchg(mark + GATE, epoch, sem="release")


@triton.jit
def _update(
    row, mark, tile, m_table, v_table, beta1_, one_beta1, beta2_, one_beta2, eps, l2, momentum, residual,
    METHOD: tl.constexpr, KIND: tl.constexpr, LOW_BITS: tl.constexpr, GRAD_KIND: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr, MAXIMIZE: tl.constexpr, L2: tl.constexpr,
    NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """One tile of COUNT groups. WHOLE: the groups tile flat memory, all pointers are 16-byte aligned."""
    param, low, grad = tl.load(row + PARAM), tl.load(row + LOW), tl.load(row + GRAD)
    m_data, m_scales = tl.load(row + M_DATA), tl.load(row + M_SCALES)
    v_data, v_scales = tl.load(row + V_DATA), tl.load(row + V_SCALES)
    rows, cols = tl.load(row + ROWS), tl.load(row + COLS)
    start = tile.to(tl.int64) * COUNT
    if WHOLE:
        # Whole groups follow each other through the rows: the parameter is one row to this code.
        numel = tl.multiple_of(rows * cols, 16)
        index = start + tl.arange(0, COUNT)
        offset = index[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        inside = offset < numel
        size = tl.minimum(numel - index * WIDTH, WIDTH)
        packed = index[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
        packed_inside = packed < tl.multiple_of(rows * cols // 2, 8)
    else:
        groups = (cols + GROUP - 1) // GROUP
        index, begin, size = group_bounds(rows, cols, groups, start, GROUP, COUNT, False)
        offset = begin[:, None] + tl.arange(0, WIDTH)[None, :]
        inside = inside_groups(tl.arange(0, WIDTH), size, False)
        at = index // groups
        packed = (at * ((cols + 1) // 2) + (begin - at * cols) // 2)[:, None] + tl.arange(0, WIDTH // 2)[None, :]
        packed_inside = inside_groups(2 * tl.arange(0, WIDTH // 2), size, False)

    g = load_gradient(grad, offset, inside, GRAD_KIND, WHOLE)
    w = load_weight(param, low, offset, inside, KIND, LOW_BITS, WHOLE)
    decay, step = _scalar(mark, DECAY), _scalar(mark, STEP_SIZE)
    if MAXIMIZE:
        g = -g
    if L2:
        g = tl.fma(w, l2, g)  # torch's add(alpha=) is a fused operation, on CPUs and on GPUs
    if METHOD != "sgd" or M[0] != 0:
        m = load_state(
            m_data, m_scales, m_table, index, offset, inside, packed, packed_inside, size, M, COUNT, WIDTH, WHOLE
        )
    if METHOD == "adam":
        v = load_state(
            v_data, v_scales, v_table, index, offset, inside, packed, packed_inside, size, V, COUNT, WIDTH, WHOLE
        )
        m = average(m, g, one_beta1)
        v = v * beta2_ + one_beta2 * g * g
        w = w * decay - step * direction(m, v, _scalar(mark, ROOT), _scalar(mark, RECIPROCAL), eps)
        store_state(v, v_data, v_scales, index, offset, inside, packed, packed_inside, size, V, COUNT, WIDTH, WHOLE)
    elif METHOD == "lion":
        w = w * decay - step * sign(average(g, m, beta1_))
        m = average(m, g, one_beta2)
    elif METHOD == "sgd":
        if M[0] != 0:
            m = m * momentum + _scalar(mark, GAIN) * g
            if NESTEROV:
                w = w * decay - step * (g + momentum * m)
            else:
                w = w * decay - step * m
        else:
            w = tl.fma(g, -step, w * decay)
    if METHOD != "sgd" or M[0] != 0:
        store_state(m, m_data, m_scales, index, offset, inside, packed, packed_inside, size, M, COUNT, WIDTH, WHOLE)
    key = tl.load(mark + KEY).to(tl.uint32, bitcast=True)
    store_weight(w, param, low, offset, inside, offset, key, KIND, LOW_BITS, STOCHASTIC, WHOLE)


@triton.jit(
    do_not_specialize=["lr", "decay", "beta1", "beta2", "dampening", "scale", "seed"],
)
def step_group(
    tickets, schedule, table, marks, lr_tensor, m_table, v_table, lr, decay, beta1, beta2, dampening, scale, seed,
    beta1_, one_beta1, beta2_, one_beta2, eps, l2, momentum, residual,
    METHOD: tl.constexpr, KIND: tl.constexpr, LOW_BITS: tl.constexpr, GRAD_KIND: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, PROBE_TILE: tl.constexpr, PROBE_CHUNKS: tl.constexpr,
    PATHS: tl.constexpr, LR_TENSOR: tl.constexpr, MAXIMIZE: tl.constexpr, L2: tl.constexpr, NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr, DECAY_FIRST: tl.constexpr, TORCH_BIAS: tl.constexpr,
):  # fmt: skip
    """One work item. `lr` ... `scale` are float64 bits (or `lr_tensor` holds the lr), `beta1_` ... are fp32 values.

    PATHS: 1 if every parameter consists of whole groups, 2 if none does, 3 for a mixture.
    """
    ticket = tl.atomic_add(tickets, 1)
    programs = tl.num_programs(0)
    epoch = (ticket // programs + 1).to(tl.int32)
    item = schedule + 2 * (ticket % programs)
    slot, work = tl.load(item).to(tl.int64), tl.load(item + 1)
    row, mark = table + slot * FIELDS, marks + slot * MARKS
    if work < 0:
        if LR_TENSOR:
            rate = tl.load(lr_tensor).to(tl.float64)
        else:
            rate = lr.to(tl.int64).to(tl.float64, bitcast=True)
        _probe(
            row, mark, epoch, (-1 - work).to(tl.int64), rate, decay.to(tl.int64).to(tl.float64, bitcast=True),
            beta1.to(tl.int64).to(tl.float64, bitcast=True), beta2.to(tl.int64).to(tl.float64, bitcast=True),
            dampening.to(tl.int64).to(tl.float64, bitcast=True), scale.to(tl.int64).to(tl.float64, bitcast=True), seed,
            METHOD, GRAD_KIND, PROBE_TILE, PROBE_CHUNKS, PATHS, DECAY_FIRST, TORCH_BIAS, STOCHASTIC,
        )  # fmt: skip
    else:
        while tl.atomic_add(mark + GATE, 0, sem="acquire") != epoch:
            pass
        if tl.load(mark + ACTIVE) != 0:
            whole = PATHS == 1
            if PATHS == 3:
                whole = tl.load(row + FLAT) != 0
            if whole:
                _update(
                    row, mark, work, m_table, v_table, beta1_, one_beta1, beta2_, one_beta2, eps, l2, momentum, residual,
                    METHOD, KIND, LOW_BITS, GRAD_KIND, M, V, GROUP, WIDTH, COUNT, True, MAXIMIZE, L2, NESTEROV, STOCHASTIC,
                )  # fmt: skip
            else:
                _update(
                    row, mark, work, m_table, v_table, beta1_, one_beta1, beta2_, one_beta2, eps, l2, momentum, residual,
                    METHOD, KIND, LOW_BITS, GRAD_KIND, M, V, GROUP, WIDTH, COUNT, False, MAXIMIZE, L2, NESTEROV, STOCHASTIC,
                )  # fmt: skip
