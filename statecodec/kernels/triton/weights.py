"""Master weights in Triton: the split and stochastic rounding, for the fused steps and for the stand-alone kernels.

Same bits as `reference.splitting` and `reference.steps`. Bits are int32 throughout, high and low parts travel as
integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec import kernels
from statecodec.kernels.reference import splitting, steps
from statecodec.kernels.triton.runtime import DTYPES, TILE, flag_word, flags_on_host, run
from statecodec.kernels.triton.tiles import Tile, load_float, pointer
from statecodec.kernels.triton.words import INF_BITS, bits, magnitude_bits, nearest_bf16, value

_NAN, _FP16_MIN_NORMAL, _FP16_BIAS, _FP16_LIMIT = (
    tl.constexpr(b) for b in (splitting.NAN_BITS, splitting.FP16_MIN_NORMAL, splitting.FP16_BIAS, 0x477FF000)
)
_OUT_OF_RANGE = tl.constexpr(kernels.OUT_OF_RANGE)
_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(c) for c in (steps.GOLDEN, steps.DITHER_1, steps.DITHER_2))


@dataclass(frozen=True, kw_only=True)
class Stored(Tile):
    """How a weight is stored, known when a kernel is compiled: its dtype, and by how many bits it is extended."""

    weight: tl.dtype
    low: int  # 0, 8, 16
    stochastic: bool = False  # how it is rounded


# --- the split


@triton.jit
def split(x, WIDTH: tl.constexpr, BF16: tl.constexpr):
    """fp32 bits to (high, low) in int32: the 16 bits of a bf16 or fp16, and a correction of WIDTH bits."""
    magnitude = x & 0x7FFFFFFF
    if BF16:
        if WIDTH == 8:  # a finite value must not round up to infinity
            fixed = tl.minimum((magnitude + 0x80) >> 8, (INF_BITS >> 8) - 1)
        else:
            fixed = tl.minimum(magnitude, INF_BITS - 1)
    else:
        fixed = _fp16_fixed(tl.minimum(magnitude, _FP16_LIMIT - 1), WIDTH)
    inf_high: tl.constexpr = INF_BITS >> 16 if BF16 else 0x7C00
    nan_high: tl.constexpr = _NAN >> 16 if BF16 else 0x7E00
    top = (fixed + (1 << (WIDTH - 1))) >> WIDTH
    rest = fixed - (top << WIDTH)
    top = tl.where(magnitude >= INF_BITS, tl.where(magnitude > INF_BITS, nan_high, inf_high), top)
    return top | ((x >> 16) & 0x8000), tl.where(magnitude >= INF_BITS, 0, rest)


@triton.jit
def join(high, low, WIDTH: tl.constexpr, BF16: tl.constexpr):
    """The inverse of `split`, exact on what was stored: (high, low) in int32 to fp32 bits."""
    top = high & 0x7FFF
    fixed = (top << WIDTH) + low
    if BF16:
        magnitude = tl.where(top > (INF_BITS >> 16), _NAN, fixed << (16 - WIDTH))
    else:
        normal = (fixed << 5 if WIDTH == 8 else fixed >> 3) + _FP16_BIAS
        small = bits(fixed.to(tl.float32) * 2.0 ** -(24 + WIDTH))
        magnitude = tl.where(fixed >= (0x400 << WIDTH), normal, small)
        magnitude = tl.where((top == 0x7C00) & (low == 0), INF_BITS, magnitude)
        magnitude = tl.where(top > 0x7C00, _NAN, magnitude)
    return magnitude | ((high & 0x8000) << 16)


@triton.jit
def _fp16_fixed(magnitude, WIDTH: tl.constexpr):
    # Below fp16's normal range: fixed point. The product is exact; rounding half up is truncation plus a comparison,
    # because adding 0.5 to an fp32 number above 2**23 would itself round.
    normal = (magnitude - _FP16_BIAS + 16) >> 5 if WIDTH == 8 else (magnitude - _FP16_BIAS) << 3
    scaled = value(tl.where(magnitude < _FP16_MIN_NORMAL, magnitude, 0)) * 2.0 ** (24 + WIDTH)
    whole = scaled.to(tl.int32)
    small = whole + tl.where(scaled - whole.to(tl.float32) >= 0.5, 1, 0)
    return tl.where(magnitude >= _FP16_MIN_NORMAL, normal, small)


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
def dither(x, element, key, DROP: tl.constexpr):
    """`reference.steps.dither` on fp32 bits; `element` counts from the parameter's start."""
    random = (mix(element.to(tl.uint32) + key) & ((1 << DROP) - 1)).to(tl.int32)
    magnitude = x & 0x7FFFFFFF
    finite = magnitude < INF_BITS
    rounded = (tl.where(finite, magnitude, 0) + random) & ~((1 << DROP) - 1)
    rounded = tl.where(finite & (rounded < INF_BITS), rounded, magnitude)
    return rounded | (x & (-0x7FFFFFFF - 1))


# --- in memory


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
        weight = value(join(high.to(tl.int32), rest.to(tl.int32), BITS, SPEC.weight == tl.bfloat16))
    else:
        weight = load_float(param, offset, inside, WEIGHT, WIDE)
    return weight


@triton.jit
def store_weight(weight, param, low, offset, inside, key, SPEC: tl.constexpr):
    """The inverse of `load_weight`: rounds to nearest, or stochastically where bits are dropped."""
    WEIGHT: tl.constexpr = SPEC.weight
    WIDE: tl.constexpr = SPEC.whole
    BITS: tl.constexpr = SPEC.low
    x = bits(weight)
    if SPEC.stochastic and BITS < 16 and SPEC.weight != tl.float32:
        x = dither(x, offset, key.to(tl.uint32, bitcast=True), 16 - BITS)
    if BITS > 0:
        LOW: tl.constexpr = tl.int8 if BITS == 8 else tl.int16
        high, rest = split(x, BITS, SPEC.weight == tl.bfloat16)
        tl.store(pointer(low, LOW, WIDE) + offset, rest.to(LOW), mask=inside)
        tl.store(pointer(param, tl.int16, WIDE) + offset, high.to(tl.int16), mask=inside)
    elif SPEC.weight == tl.bfloat16:  # the interpreter's own conversion truncates
        tl.store(pointer(param, tl.int16, WIDE) + offset, nearest_bf16(x).to(tl.int16), mask=inside)
    else:
        tl.store(pointer(param, WEIGHT, WIDE) + offset, value(x).to(WEIGHT), mask=inside)


# --- alone


@triton.jit
def _encode(x_ptr, high_ptr, low_ptr, flags_ptr, n: tl.int64, SPEC: tl.constexpr, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
    store_weight(x, high_ptr, low_ptr, offset, offset < n, 0, SPEC)
    if SPEC.weight == tl.float16:
        magnitude = magnitude_bits(x)
        tl.store(flags_ptr + offset * 0, _OUT_OF_RANGE, mask=(magnitude >= _FP16_LIMIT) & (magnitude < INF_BITS))


@triton.jit
def _decode(high_ptr, low_ptr, out_ptr, n: tl.int64, SPEC: tl.constexpr, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(out_ptr + offset, load_weight(high_ptr, low_ptr, offset, offset < n, SPEC), mask=offset < n)


def encode_split(x: Tensor, high: Tensor, low: Tensor) -> int:
    """See `reference.splitting.encode_split`.

    Only an fp16 `high` can raise a flag, so only then does it synchronise.
    """
    n, flags = x.numel(), flag_word(x)
    run(_encode, -(-n // TILE), x, high, low, flags, n, SPEC=_stored(high, low), TILE=TILE)
    return 0 if high.dtype == torch.bfloat16 else flags_on_host(flags)


def decode_split(high: Tensor, low: Tensor, out: Tensor) -> None:
    """See `reference.splitting.decode_split`."""
    n = out.numel()
    run(_decode, -(-n // TILE), high, low, out, n, SPEC=_stored(high, low), TILE=TILE)


def _stored(high: Tensor, low: Tensor) -> Stored:
    return Stored(weight=DTYPES[high.dtype], low=8 * low.element_size())
