"""Reads the tables; `begin` counts a step and computes, once a parameter, what depends on the count."""

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
def number(news, count, NUMBER: tl.constexpr):
    """One of the group's numbers, in float64."""
    return tl.load(news + count + NUMBER).to(tl.float64, bitcast=True)


@triton.jit
def own_chunk(chunks):
    """This program's chunk: parameter, first tile."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    return tl.load(chunk).to(tl.int64), tl.load(chunk + 1)


@triton.jit
def addresses_of(fields, count):
    """The addresses of weight, low part, and both moments with their scales."""
    return (
        entry(fields, count, t.PARAM), entry(fields, count, t.LOW), entry(fields, count, t.M_DATA),
        entry(fields, count, t.M_SCALES), entry(fields, count, t.V_DATA), entry(fields, count, t.V_SCALES),
    )  # fmt: skip


@triton.jit
def group_numbers(news, count):
    """The rules' scalars that are the same for all parameters, rounded to fp32 once."""
    beta1, beta2 = number(news, count, t.BETA1), number(news, count, t.BETA2)
    return (
        beta1.to(tl.float32), (1.0 - beta1).to(tl.float32), beta2.to(tl.float32), (1.0 - beta2).to(tl.float32),
        number(news, count, t.EPS).to(tl.float32), number(news, count, t.L2).to(tl.float32),
        number(news, count, t.MOMENTUM).to(tl.float32), number(news, count, t.RESIDUAL).to(tl.float32),
    )  # fmt: skip


@triton.jit
def parameter_numbers(scalar_fields, count):
    """The rules' scalars of this parameter."""
    return (
        entry(scalar_fields, count, t.DECAY_BY), entry(scalar_fields, count, t.SIZE),
        entry(scalar_fields, count, t.ROOT), entry(scalar_fields, count, t.RECIPROCAL),
        entry(scalar_fields, count, t.GAIN),
    )  # fmt: skip


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, for integers 0 <= exponent < 2**25: an fp32 counter counts no further."""
    result = exponent.to(tl.float64) * 0.0 + 1.0
    for bit in tl.static_range(25):
        result = tl.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


@triton.jit
def begin(
    news, table, scalars, lr_tensor, count: tl.int64, LANES: tl.constexpr, METHOD: tl.constexpr,
    LR_TENSOR: tl.constexpr, TORCH_BIAS: tl.constexpr,
):  # fmt: skip
    """Count this step in every parameter that has a gradient; its scalars, in float64, rounded to fp32 once."""
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = at < count
    live = live & (tl.load(news + at, mask=live, other=0) != 0)
    counter = tl.load(table + t.STEP * count + at, mask=live, other=0).to(tl.pointer_type(tl.float32))
    steps = tl.load(counter, mask=live, other=0.0) + 1.0
    tl.store(counter, steps, mask=live)
    lr = number(news, count, t.LR)
    if LR_TENSOR:
        lr = tl.load(lr_tensor).to(tl.float64)
    n = steps.to(tl.int32)
    c1 = 1.0 - _power(number(news, count, t.BETA1), n)
    root = tl.sqrt(1.0 - _power(number(news, count, t.BETA2), n))
    size, gain = lr + c1 * 0.0, c1 * 0.0 + 1.0
    if METHOD == "adam" or METHOD == "slim":
        size = lr / c1
    if METHOD == "foam":
        size = lr * number(news, count, t.SCALE) / c1
        if not TORCH_BIAS:
            size = lr * number(news, count, t.SCALE) * root / c1
            root = root * 0.0 + 1.0
    if METHOD == "sgd":
        gain = tl.where(n == 1, 1.0, 1.0 - number(news, count, t.DAMPENING))
    decay = 1.0 - lr * number(news, count, t.WEIGHT_DECAY) + c1 * 0.0
    key = dither_key(tl.load(news + count + t.SEED), tl.load(table + t.INDEX * count + at, mask=live, other=0), n)
    root = root.to(tl.float32)
    out = scalars + at
    tl.store(out + t.DECAY_BY * count, decay.to(tl.float32), mask=live)
    tl.store(out + t.SIZE * count, size.to(tl.float32), mask=live)
    tl.store(out + t.ROOT * count, root, mask=live)
    tl.store(out + t.RECIPROCAL * count, tl.div_rn(root * 0.0 + 1.0, root), mask=live)
    tl.store(out + t.GAIN * count, gain.to(tl.float32), mask=live)
    tl.store(out + t.KEY * count, key.to(tl.float32, bitcast=True), mask=live)
