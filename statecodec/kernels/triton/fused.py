"""Fused steps: a whole parameter group in one launch, every stored byte read once and written once.

The launch is a list of work items (`plan.schedule`), two kinds per parameter, handed out in order by a ticket:

* probe: look for gradient elements that are NaN or beyond LARGEST_GRADIENT. The last probe of a parameter to finish
  begins its step: it counts (`step` or `skipped`), computes the scalars that depend on the step count, and opens the
  gate.
* update: wait for the gate, then decode, step and encode a run of tiles, unless the gate says skip.

A parameter's probes stand before its updates, and a ticket is taken only by a program that is running: what an update
waits for is always under way, so the wait ends whatever order the hardware starts programs in. Nothing is reset between
launches: tickets count on, and the gate holds the launch's number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.fused import LARGEST_GRADIENT
from statecodec.kernels.triton.probes import largest_and_squares, largest_gradient, share
from statecodec.kernels.triton.steps import dither_key
from statecodec.kernels.triton.updates import (
    ACTIVE,
    BAD,
    COLS,
    DECAY,
    DONE,
    FIELDS,
    FLAT,
    GAIN,
    GATE,
    GRAD,
    INDEX,
    KEY,
    MARKS,
    PROBES,
    RECIPROCAL,
    ROOT,
    ROWS,
    SKIPPED,
    STEP,
    STEP_SIZE,
    TILES,
    update_folded,
    update_tile,
)  # fmt: skip

_LIMIT = tl.constexpr((127 + 48) << 23)  # bits of LARGEST_GRADIENT
assert LARGEST_GRADIENT == 2.0**48


@triton.jit
def _bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, for an integer 0 <= exponent < 2**25: an fp32 counter counts no further."""
    result = base * 0.0 + 1.0
    for bit in tl.static_range(25):
        result = tl.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


@triton.jit
def _begin(
    row, mark, bad, lr, decay, beta1, beta2, dampening, scale, seed, METHOD: tl.constexpr, DECAY_FIRST: tl.constexpr,
    TORCH_BIAS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Count a step or a skip, and leave the scalars of the step. All float64; rounded to fp32 once, as a host would."""
    counter = tl.load(row + tl.where(bad != 0, SKIPPED, STEP)).to(tl.pointer_type(tl.float32))
    t = tl.load(counter) + 1.0
    tl.store(counter, t)
    tl.store(mark + ACTIVE, (bad == 0).to(tl.int32))
    c1 = 1.0 - _power(beta1, t.to(tl.int32))
    root = tl.sqrt(1.0 - _power(beta2, t.to(tl.int32)))
    size = lr
    gain = lr * 0.0 + 1.0
    if METHOD == "adam" or METHOD == "slim" or METHOD == "foam":
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
    row, mark, epoch, chunk, lr, decay, beta1, beta2, dampening, scale, seed, beta2_, one_beta2, METHOD: tl.constexpr,
    GRAD_KIND: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    TALL: tl.constexpr, BROAD: tl.constexpr, PATHS: tl.constexpr, DECAY_FIRST: tl.constexpr, TORCH_BIAS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    grad = tl.load(row + GRAD)
    numel = tl.load(row + ROWS) * tl.load(row + COLS)
    whole = PATHS == 1
    if PATHS == 3:
        whole = tl.load(row + FLAT) != 0
    if METHOD == "slim":
        largest = largest_and_squares(row, chunk, GRAD_KIND, HIGH, WIDE, TALL, BROAD)
    elif whole:
        largest = largest_gradient(grad, numel, chunk, GRAD_KIND, TILE, CHUNKS, True)
    else:
        largest = largest_gradient(grad, numel, chunk, GRAD_KIND, TILE, CHUNKS, False)
    if largest > _LIMIT:
        tl.atomic_or(mark + BAD, 1)
    tl.debug_barrier()  # what this program found goes out before it is counted as done
    done = tl.atomic_add(mark + DONE, 1, sem="acq_rel") + 1
    if done == tl.load(row + PROBES).to(tl.int32):
        tl.atomic_xchg(mark + DONE, 0)
        bad = tl.atomic_xchg(mark + BAD, 0)
        _begin(
            row, mark, bad, lr, decay, beta1, beta2, dampening, scale, seed, METHOD, DECAY_FIRST, TORCH_BIAS, STOCHASTIC
        )
        if METHOD == "slim":
            if bad == 0:
                share(row, beta2_, one_beta2, WIDE, TALL)
        tl.debug_barrier()
        tl.atomic_xchg(mark + GATE, epoch, sem="release")


@triton.jit(do_not_specialize=["lr", "decay", "beta1", "beta2", "dampening", "scale", "seed"])
def step_group(
    tickets, schedule, table, marks, lr_tensor, m_table, v_table, lr, decay, beta1, beta2, dampening, scale, seed,
    beta1_, one_beta1, beta2_, one_beta2, eps, l2, momentum, residual,
    METHOD: tl.constexpr, KIND: tl.constexpr, LOW_BITS: tl.constexpr, GRAD_KIND: tl.constexpr, M: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    PROBE_TILE: tl.constexpr,
    PROBE_CHUNKS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr, BROAD: tl.constexpr,
    PATHS: tl.constexpr, LR_TENSOR: tl.constexpr, MAXIMIZE: tl.constexpr, L2: tl.constexpr, NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr, MEAN_OF_SQUARES: tl.constexpr, TRUE_TAIL: tl.constexpr, DECAY_FIRST: tl.constexpr,
    TORCH_BIAS: tl.constexpr,
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
        rate = _float64(lr)
        if LR_TENSOR:
            rate = tl.load(lr_tensor).to(tl.float64)
        _probe(
            row, mark, epoch, (-1 - work).to(tl.int64), rate, _float64(decay), _float64(beta1), _float64(beta2),
            _float64(dampening), _float64(scale), seed, beta2_, one_beta2, METHOD, GRAD_KIND, PROBE_TILE,
            PROBE_CHUNKS, HIGH, WIDE, TALL, BROAD, PATHS, DECAY_FIRST, TORCH_BIAS, STOCHASTIC,
        )  # fmt: skip
    else:
        while tl.atomic_add(mark + GATE, 0, sem="acquire") != epoch:
            pass
        if tl.load(mark + ACTIVE) != 0:
            tiles = tl.minimum(tl.load(row + TILES).to(tl.int32) - work * RUN, RUN)
            first = work.to(tl.int64) * (RUN * COUNT)
            whole = PATHS == 1
            if PATHS == 3:
                whole = tl.load(row + FLAT) != 0
            for tile in range(tiles):
                if whole:
                    _update(
                        row, mark, first + tile * COUNT, m_table, v_table, beta1_, one_beta1, beta2_, one_beta2, eps,
                        l2,
                        momentum, residual, METHOD, KIND, LOW_BITS, GRAD_KIND, M, V, GROUP, WIDTH, COUNT, BLOCK, True,
                        MAXIMIZE, L2, NESTEROV, STOCHASTIC, MEAN_OF_SQUARES, TRUE_TAIL, DECAY_FIRST,
                    )  # fmt: skip
                else:
                    _update(
                        row, mark, first + tile * COUNT, m_table, v_table, beta1_, one_beta1, beta2_, one_beta2, eps,
                        l2,
                        momentum, residual, METHOD, KIND, LOW_BITS, GRAD_KIND, M, V, GROUP, WIDTH, COUNT, BLOCK, False,
                        MAXIMIZE, L2, NESTEROV, STOCHASTIC, MEAN_OF_SQUARES, TRUE_TAIL, DECAY_FIRST,
                    )  # fmt: skip


@triton.jit
def _update(
    row, mark, start, m_table, v_table, beta1, one_beta1, beta2, one_beta2, eps, l2, momentum, residual,
    METHOD: tl.constexpr, KIND: tl.constexpr, LOW_BITS: tl.constexpr, GRAD_KIND: tl.constexpr, M: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    MAXIMIZE: tl.constexpr, L2: tl.constexpr, NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr,
    MEAN_OF_SQUARES: tl.constexpr, TRUE_TAIL: tl.constexpr, DECAY_FIRST: tl.constexpr,
):  # fmt: skip
    if METHOD == "foam":
        update_folded(
            row, mark, start, m_table, v_table, one_beta1, beta2, one_beta2, eps, residual, KIND, LOW_BITS, GRAD_KIND,
            M, V, GROUP, WIDTH, COUNT, BLOCK, WHOLE, MAXIMIZE, STOCHASTIC, MEAN_OF_SQUARES, TRUE_TAIL, DECAY_FIRST,
        )  # fmt: skip
    else:
        update_tile(
            row, mark, start, m_table, v_table, beta1, one_beta1, beta2, one_beta2, eps, l2, momentum, METHOD, KIND,
            LOW_BITS, GRAD_KIND, M, V, GROUP, WIDTH, COUNT, WHOLE, MAXIMIZE, L2, NESTEROV, STOCHASTIC,
        )  # fmt: skip
