"""Weights, gradients and states as they are stored, for the general fused step: loading, storing, stochastic rounding.

The arithmetic of the encodings is that of the stand-alone kernels (`companding`, `splitting`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.reference import steps as spec
from statecodec.kernels.triton.companding import largest_bits, load_groups, store_groups
from statecodec.kernels.triton.splitting import join, split
from statecodec.kernels.triton.tiles import pointer

_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(c) for c in (spec.GOLDEN, spec.DITHER_1, spec.DITHER_2))
_INF = tl.constexpr(0x7F800000)


@triton.jit
def mix(x):
    """The 32-bit hash of `reference.steps.mix`, on uint32."""
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def dither_key(seed, index, t):
    """What the random numbers of one parameter's step start from (uint32)."""
    start = seed.to(tl.uint32) + index.to(tl.uint32) * _GOLDEN
    return mix(mix(start) + t.to(tl.uint32))


@triton.jit
def dither(bits, element, key, DROP: tl.constexpr):
    """`reference.steps.dither` on fp32 bits; `element` counts from the parameter's start."""
    random = (mix(element.to(tl.uint32) + key) & ((1 << DROP) - 1)).to(tl.int32)
    magnitude = bits & 0x7FFFFFFF
    finite = magnitude < _INF
    rounded = (tl.where(finite, magnitude, 0) + random) & ~((1 << DROP) - 1)
    rounded = tl.where(finite & (rounded < _INF), rounded, magnitude)
    return rounded | (bits & (-0x7FFFFFFF - 1))


@triton.jit
def load_float(address, offset, inside, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """fp32 values of floating point numbers."""
    return tl.load(pointer(address, DTYPE, SPEC.whole) + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_weight(param, low, offset, inside, SPEC: tl.constexpr):
    """fp32 values of a weight."""
    WEIGHT: tl.constexpr = SPEC.weight  # triton 3.6 passes on constants only under a name
    WIDE: tl.constexpr = SPEC.whole
    BITS: tl.constexpr = SPEC.low
    if BITS > 0:
        LOW: tl.constexpr = tl.int8 if BITS == 8 else tl.int16
        high = tl.load(pointer(param, tl.int16, WIDE) + offset, mask=inside, other=0)
        rest = tl.load(pointer(low, LOW, WIDE) + offset, mask=inside, other=0)
        bits = join(high.to(tl.int32), rest.to(tl.int32), BITS, SPEC.weight == tl.bfloat16)
        value = bits.to(tl.float32, bitcast=True)
    else:
        value = load_float(param, offset, inside, WEIGHT, SPEC)
    return value


@triton.jit
def store_weight(value, param, low, offset, inside, key, SPEC: tl.constexpr):
    """The inverse of `load_weight`: rounds to nearest, or stochastically where bits are dropped."""
    WEIGHT: tl.constexpr = SPEC.weight
    WIDE: tl.constexpr = SPEC.whole
    BITS: tl.constexpr = SPEC.low
    bits = value.to(tl.int32, bitcast=True)
    if SPEC.stochastic and BITS < 16 and SPEC.weight != tl.float32:
        bits = dither(bits, offset, key.to(tl.uint32, bitcast=True), 16 - BITS)
    if BITS > 0:
        LOW: tl.constexpr = tl.int8 if BITS == 8 else tl.int16
        high, rest = split(bits, BITS, SPEC.weight == tl.bfloat16)
        tl.store(pointer(low, LOW, WIDE) + offset, rest.to(LOW), mask=inside)
        tl.store(pointer(param, tl.int16, WIDE) + offset, high.to(tl.int16), mask=inside)
    elif SPEC.weight == tl.bfloat16:
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # nearest even; the interpreter's own conversion truncates
        tl.store(pointer(param, tl.int16, WIDE) + offset, high.to(tl.int16), mask=inside)
    else:
        value = bits.to(tl.float32, bitcast=True)
        tl.store(pointer(param, WEIGHT, WIDE) + offset, value.to(WEIGHT), mask=inside)


@triton.jit
def load_state(data, scales, table, here, STATE: tl.constexpr, SPEC: tl.constexpr):
    """fp32 values [count, width] of a state; `here` is what `places` found."""
    if STATE.curve is None:
        value = load_float(data, here[1], here[2], tl.float32, SPEC)
    else:
        value = load_groups(data, scales, table, here, STATE.curve.bits, SPEC)
    return value


@triton.jit
def store_state(value, data, scales, here, good, STATE: tl.constexpr, SPEC: tl.constexpr):
    """The inverse of `load_state`, for `good` groups (or, of a dense state, good elements) only."""
    if STATE.curve is None:
        tl.store(pointer(data, tl.float32, SPEC.whole) + here[1], value, mask=here[2] & good)
    else:
        CURVE: tl.constexpr = STATE.curve
        good_groups = here[5] & (tl.min(good.to(tl.int32), axis=1) != 0)
        value = tl.where(good_groups[:, None], value, 0.0)  # saves registers
        store_groups(value, largest_bits(value, CURVE.signed), good_groups, data, scales, here, CURVE, SPEC)
