"""Weights, gradients and states as they are stored, for the general fused step: loading, storing, stochastic rounding.

The arithmetic of the encodings is that of the stand-alone kernels (`companding`, `splitting`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.reference import steps as spec
from statecodec.kernels.triton.companding import (
    magnitude_bits,
    pack_nibbles,
    quantise,
    scale_bits,
    scale_value,
    unpack_nibbles,
)  # fmt: skip
from statecodec.kernels.triton.splitting import join, split

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
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from the table of addresses. ALIGNED promises 16 bytes, without which there are no wide accesses."""
    typed = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        typed = tl.multiple_of(typed, 16)
    return typed


@triton.jit
def load_weight(param, low, offset, inside, SPEC: tl.constexpr):
    """fp32 values of a weight."""
    WIDE: tl.constexpr = SPEC.whole
    BITS: tl.constexpr = SPEC.low
    BF16: tl.constexpr = SPEC.weight == "bf16"
    if SPEC.weight == "fp32":
        value = tl.load(pointer(param, tl.float32, WIDE) + offset, mask=inside, other=0.0)
    else:
        high = tl.load(pointer(param, tl.int16, WIDE) + offset, mask=inside, other=0)
        if BITS > 0:
            KIND: tl.constexpr = tl.int8 if BITS == 8 else tl.int16
            rest = tl.load(pointer(low, KIND, WIDE) + offset, mask=inside, other=0)
            value = join(high.to(tl.int32), rest.to(tl.int32), BITS, BF16)
            value = value.to(tl.float32, bitcast=True)
        elif SPEC.weight == "bf16":
            value = (high.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            value = high.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def store_weight(value, param, low, offset, inside, key, SPEC: tl.constexpr):
    """The inverse of `load_weight`: rounds to nearest, or stochastically where bits are dropped."""
    WIDE: tl.constexpr = SPEC.whole
    BITS: tl.constexpr = SPEC.low
    BF16: tl.constexpr = SPEC.weight == "bf16"
    if SPEC.weight == "fp32":
        tl.store(pointer(param, tl.float32, WIDE) + offset, value, mask=inside)
    else:
        bits = value.to(tl.int32, bitcast=True)
        if SPEC.stochastic and BITS < 16:
            DROP: tl.constexpr = 16 - BITS
            bits = dither(bits, offset, key.to(tl.uint32, bitcast=True), DROP)
        if BITS > 0:
            KIND: tl.constexpr = tl.int8 if BITS == 8 else tl.int16
            high, rest = split(bits, BITS, BF16)
            tl.store(pointer(low, KIND, WIDE) + offset, rest.to(KIND), mask=inside)
        elif SPEC.weight == "bf16":
            # To nearest even in integers, because the interpreter truncates.
            high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        else:
            high = bits.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        tl.store(pointer(param, tl.int16, WIDE) + offset, high.to(tl.int16), mask=inside)


@triton.jit
def load_gradient(gradient, offset, inside, SPEC: tl.constexpr):
    """fp32 values of a gradient, negated to ascend."""
    WIDE: tl.constexpr = SPEC.whole
    if SPEC.gradient == "fp32":
        value = tl.load(pointer(gradient, tl.float32, WIDE) + offset, mask=inside, other=0.0)
    elif SPEC.gradient == "bf16":
        high = tl.load(pointer(gradient, tl.int16, WIDE) + offset, mask=inside, other=0)
        value = (high.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(pointer(gradient, tl.float16, WIDE) + offset, mask=inside, other=0.0).to(tl.float32)
    if SPEC.maximize:
        value = -value
    return value


@triton.jit
def load_state(data, scales, table, places, FORM: tl.constexpr, SPEC: tl.constexpr):
    """fp32 values [count, width] of a state; `places` is what `general.places` found."""
    index, offset, inside, packed, packed_inside, exists = places
    WIDE: tl.constexpr = SPEC.whole
    COUNT: tl.constexpr = SPEC.count
    WIDTH: tl.constexpr = SPEC.width
    if FORM.kind == "dense":
        value = tl.load(pointer(data, tl.float32, WIDE) + offset, mask=inside, other=0.0)
    else:
        if FORM.bits == 4:
            pairs = tl.load(pointer(data, tl.uint8, WIDE) + packed, mask=packed_inside, other=0)
            code = unpack_nibbles(pairs.to(tl.int32), COUNT, WIDTH)
        else:
            code = tl.load(pointer(data, tl.uint8, WIDE) + offset, mask=inside, other=0).to(tl.int32)
        scale = tl.load(pointer(scales, tl.int16, WIDE) + index, mask=exists, other=0).to(tl.int32)
        value = tl.load(table + code) * scale_value(scale)[:, None]
    return value


@triton.jit
def store_state(value, data, scales, places, good, FORM: tl.constexpr, SPEC: tl.constexpr):
    """The inverse of `load_state`, for `good` groups (or, of a dense state, good elements) only."""
    index, offset, inside, packed, packed_inside, exists = places
    WIDE: tl.constexpr = SPEC.whole
    COUNT: tl.constexpr = SPEC.count
    WIDTH: tl.constexpr = SPEC.width
    if FORM.kind == "dense":
        tl.store(pointer(data, tl.float32, WIDE) + offset, value, mask=inside & good)
    else:
        group_good = exists & (tl.min(good.to(tl.int32), axis=1) != 0)
        value = tl.where(inside & group_good[:, None], value, 0.0)
        scale = scale_bits(tl.max(magnitude_bits(value), axis=1), FORM.min_scale)
        code = quantise(value, scale[:, None], FORM)
        tl.store(pointer(scales, tl.int16, WIDE) + index, scale.to(tl.int16), mask=group_good)
        if FORM.bits == 4:
            pairs = pack_nibbles(code, COUNT, WIDTH).to(tl.uint8)
            tl.store(pointer(data, tl.uint8, WIDE) + packed, pairs, mask=packed_inside & group_good[:, None])
        else:
            tl.store(pointer(data, tl.uint8, WIDE) + offset, code.to(tl.uint8), mask=inside & group_good[:, None])
