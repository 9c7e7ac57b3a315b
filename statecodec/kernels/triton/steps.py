"""Device functions of the fused steps: the update rules, the weight as it is stored, the states as they are stored.

The rules are those of `reference.steps`, in the order of operations of `cpu.steps`, every operation rounded separately.
Scalars that depend on the step count come from the launch's bookkeeping (`fused._begin`), which computes them in
float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statecodec.kernels.reference import steps as spec
from statecodec.kernels.triton import companding, splitting
from statecodec.kernels.triton.companding import pack_nibbles, quantise, scale_bits, scale_value, unpack_nibbles
from statecodec.kernels.triton.splitting import join, split

_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(c) for c in (spec.GOLDEN, spec.DITHER_1, spec.DITHER_2))
_INF = tl.constexpr(0x7F800000)
_magnitude_bits = companding.magnitude_bits

# How a state is stored, the first entry of its format tuple; a companded one goes on with
# (bits, kind, top, signed, min_scale, steps, half the lowest level).
DENSE, COMPANDED = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def over(x, divisor, reciprocal):
    """x / divisor, correctly rounded, with the reciprocal rounded once (see `companding.ratio`); for values of moderate
    size."""
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)


@triton.jit
def average(m, g, rate):
    """The exponential average: m + rate * (g - m)."""
    return m + rate * (g - m)


@triton.jit
def direction(m, v, root, reciprocal, eps):
    """m / (sqrt(v) / root + eps)."""
    return tl.div_rn(m, over(tl.sqrt_rn(v), root, reciprocal) + eps)


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


# --- stochastic rounding


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


# --- the weight


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from an entry of the table of addresses. ALIGNED promises 16 bytes, without which there are no wide
    accesses."""
    typed = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        typed = tl.multiple_of(typed, 16)
    return typed


@triton.jit
def load_weight(param, low, offset, inside, KIND: tl.constexpr, LOW: tl.constexpr, ALIGNED: tl.constexpr):
    """fp32 values of a weight stored as KIND (`fp32`, `bf16`, `fp16`), extended by LOW bits (0, 8 or 16)."""
    if KIND == "fp32":
        value = tl.load(pointer(param, tl.float32, ALIGNED) + offset, mask=inside, other=0.0)
    else:
        high = tl.load(pointer(param, tl.int16, ALIGNED) + offset, mask=inside, other=0)
        if LOW > 0:
            if LOW == 8:
                rest = tl.load(pointer(low, tl.int8, ALIGNED) + offset, mask=inside, other=0)
            else:
                rest = tl.load(pointer(low, tl.int16, ALIGNED) + offset, mask=inside, other=0)
            value = join(high.to(tl.int32), rest.to(tl.int32), LOW, KIND == "bf16").to(tl.float32, bitcast=True)
        elif KIND == "bf16":
            value = (high.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            value = high.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def store_weight(
    value, param, low, offset, inside, element, key, KIND: tl.constexpr, LOW: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_weight`: rounds to nearest, or stochastically where bits are dropped."""
    if KIND == "fp32":
        tl.store(pointer(param, tl.float32, ALIGNED) + offset, value, mask=inside)
    else:
        bits = value.to(tl.int32, bitcast=True)
        if STOCHASTIC and LOW < 16:
            bits = dither(bits, element, key, 16 - LOW)
        if LOW > 0:
            high, rest = split(bits, LOW, KIND == "bf16")
            if LOW == 8:
                tl.store(pointer(low, tl.int8, ALIGNED) + offset, rest.to(tl.int8), mask=inside)
            else:
                tl.store(pointer(low, tl.int16, ALIGNED) + offset, rest.to(tl.int16), mask=inside)
        elif KIND == "bf16":
            # To nearest even in integers, because the interpreter truncates; a NaN stays quiet instead of carrying.
            nan = (bits & 0x7FFFFFFF) > _INF
            high = tl.where(nan, (bits >> 16) | 0x40, (tl.where(nan, 0, bits) + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        else:
            high = bits.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        tl.store(pointer(param, tl.int16, ALIGNED) + offset, high.to(tl.int16), mask=inside)


@triton.jit
def load_gradient(grad, offset, inside, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """fp32 values of a gradient stored as KIND."""
    if KIND == "fp32":
        value = tl.load(pointer(grad, tl.float32, ALIGNED) + offset, mask=inside, other=0.0)
    elif KIND == "bf16":
        high = tl.load(pointer(grad, tl.int16, ALIGNED) + offset, mask=inside, other=0)
        value = (high.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(pointer(grad, tl.float16, ALIGNED) + offset, mask=inside, other=0.0).to(tl.float32)
    return value


# --- the states


@triton.jit
def load_state(
    data, scales, table, index, offset, inside, packed, packed_inside, size, FORMAT: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """fp32 values [COUNT, WIDTH] of a state: `offset` in elements, `packed` in bytes of nibbles, `index` in groups."""
    if FORMAT[0] == DENSE:
        value = tl.load(pointer(data, tl.float32, ALIGNED) + offset, mask=inside, other=0.0)
    else:
        if FORMAT[1] == 4:
            pairs = tl.load(pointer(data, tl.uint8, ALIGNED) + packed, mask=packed_inside, other=0)
            code = unpack_nibbles(pairs.to(tl.int32), COUNT, WIDTH)
        else:
            code = tl.load(pointer(data, tl.uint8, ALIGNED) + offset, mask=inside, other=0).to(tl.int32)
        scale = tl.load(pointer(scales, tl.int16, ALIGNED) + index, mask=size > 0, other=0).to(tl.int32)
        value = tl.load(table + code) * scale_value(scale)[:, None]
    return value


@triton.jit
def store_state(
    value, data, scales, index, offset, inside, packed, packed_inside, size, FORMAT: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_state`; lanes outside must hold zeros. A value beyond bf16's largest scale saturates."""
    if FORMAT[0] == DENSE:
        tl.store(pointer(data, tl.float32, ALIGNED) + offset, value, mask=inside)
    else:
        scale = scale_bits(tl.max(_magnitude_bits(value), axis=1), FORMAT[5])
        code = quantise(value, scale[:, None], FORMAT[2], FORMAT[3], FORMAT[4], FORMAT[6], FORMAT[7])
        tl.store(pointer(scales, tl.int16, ALIGNED) + index, scale.to(tl.int16), mask=size > 0)
        if FORMAT[1] == 4:
            pairs = pack_nibbles(code, COUNT, WIDTH).to(tl.uint8)
            tl.store(pointer(data, tl.uint8, ALIGNED) + packed, pairs, mask=packed_inside)
        else:
            tl.store(pointer(data, tl.uint8, ALIGNED) + offset, code.to(tl.uint8), mask=inside)


__all__ = [
    "COMPANDED", "DENSE", "average", "direction", "dither", "dither_key", "join", "load_gradient", "load_state",
    "load_weight", "over", "sign", "split", "splitting", "store_state", "store_weight",
]  # fmt: skip
