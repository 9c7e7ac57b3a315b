"""Reading the tables, and `begin`: counting a step and computing what of it depends on the count, once a parameter."""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.triton import tables as t
from statecodec.kernels.triton.stored import dither_key

LANES = 128  # parameters a program of `begin` looks at


@triton.jit
def entry(column, count, ROW: tl.constexpr):
    """One entry of a parameter's column in `table` or `scalars`, which are [rows, count]."""
    return tl.load(column + ROW * count)


@triton.jit
def _number(news, count, NUMBER: tl.constexpr):
    return tl.load(news + count + NUMBER).to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, for integers 0 <= exponent < 2**25: an fp32 counter counts no further."""
    result = exponent.to(tl.float64) * 0.0 + 1.0
    for bit in tl.static_range(25):
        result = tl.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


@triton.jit
def begin(news, table, scalars, lr_tensor, count: tl.int64, LANES: tl.constexpr, SPEC: tl.constexpr):
    """Count this step in every parameter that has a gradient; all its numbers, in float64, rounded to fp32 once."""
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = at < count
    live = live & (tl.load(news + at, mask=live, other=0) != 0)
    counter = tl.load(table + t.STEP * count + at, mask=live, other=0).to(tl.pointer_type(tl.float32))
    steps = tl.load(counter, mask=live, other=0.0) + 1.0
    tl.store(counter, steps, mask=live)
    lr = _number(news, count, t.LR)
    if SPEC.lr_tensor:
        lr = tl.load(lr_tensor).to(tl.float64)
    beta1, beta2 = _number(news, count, t.BETA1), _number(news, count, t.BETA2)
    n = steps.to(tl.int32)
    c1, root = 1.0 - _power(beta1, n), tl.sqrt(1.0 - _power(beta2, n))
    size, gain = lr + c1 * 0.0, c1 * 0.0 + 1.0
    if SPEC.method == "adam" or SPEC.method == "slim":
        size = lr / c1
    if SPEC.method == "foam":
        size = lr * _number(news, count, t.SCALE) / c1
        if not SPEC.torch_bias:
            size = lr * _number(news, count, t.SCALE) * root / c1
            root = root * 0.0 + 1.0
    if SPEC.method == "sgd":
        gain = tl.where(n == 1, 1.0, 1.0 - _number(news, count, t.DAMPENING))
    root = root.to(tl.float32)
    out = scalars + at
    tl.store(out + t.SIZE * count, size.to(tl.float32), mask=live)
    tl.store(out + t.GAIN * count, gain.to(tl.float32), mask=live)
    tl.store(out + t.ROOT * count, root, mask=live)
    tl.store(out + t.RECIPROCAL * count, tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root), mask=live)
    _same(out + t.DECAY_BY * count, 1.0 - lr * _number(news, count, t.WEIGHT_DECAY), live)
    _same(out + t.KEEP_1 * count, beta1, live)
    _same(out + t.RATE_1 * count, 1.0 - beta1, live)
    _same(out + t.KEEP_2 * count, beta2, live)
    _same(out + t.RATE_2 * count, 1.0 - beta2, live)
    _same(out + t.EPSILON * count, _number(news, count, t.EPS), live)
    _same(out + t.L2_DECAY * count, _number(news, count, t.L2), live)
    _same(out + t.HEAVY * count, _number(news, count, t.MOMENTUM), live)
    _same(out + t.REST * count, _number(news, count, t.RESIDUAL), live)
    if SPEC.stochastic:
        key = dither_key(tl.load(news + count + t.SEED), tl.load(table + t.INDEX * count + at, mask=live, other=0), n)
        tl.store(out + t.KEY * count, key.to(tl.float32, bitcast=True), mask=live)


@triton.jit
def _same(out, number, live):
    """The same number for every parameter."""
    tl.store(out, number.to(tl.float32) + tl.zeros(live.shape, tl.float32), mask=live)
