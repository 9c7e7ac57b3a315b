"""The master-weight split in Triton: the device arithmetic, shared with the fused steps, and the stand-alone kernels.

Same bits as `reference.splitting`. Bits are int32 throughout, `high` and `low` travel as integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecodec import kernels
from statecodec.kernels.reference import splitting as spec
from statecodec.kernels.triton.runtime import TILE, flag_word, flags_on_host, run

_INF, _NAN, _FP16_MIN_NORMAL, _FP16_BIAS, _FP16_LIMIT = (
    tl.constexpr(b) for b in (spec.INF_BITS, spec.NAN_BITS, spec.FP16_MIN_NORMAL, spec.FP16_BIAS, 0x477FF000)
)
_OUT_OF_RANGE = tl.constexpr(kernels.OUT_OF_RANGE)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def split(bits, WIDTH: tl.constexpr, BF16: tl.constexpr):
    """fp32 bits to (high, low) in int32: the 16 bits of a bf16 or fp16, and a correction of WIDTH bits."""
    magnitude = bits & _MAGNITUDE
    if BF16:
        if WIDTH == 8:  # a finite value must not round up to infinity
            fixed = tl.minimum((magnitude + 0x80) >> 8, (_INF >> 8) - 1)
        else:
            fixed = tl.minimum(magnitude, _INF - 1)
        inf_high: tl.constexpr = _INF >> 16
        nan_high: tl.constexpr = _NAN >> 16
    else:
        fixed = _fp16_fixed(tl.minimum(magnitude, _FP16_LIMIT - 1), WIDTH)
        inf_high: tl.constexpr = 0x7C00
        nan_high: tl.constexpr = 0x7E00
    top = (fixed + (1 << (WIDTH - 1))) >> WIDTH
    rest = fixed - (top << WIDTH)
    top = tl.where(magnitude >= _INF, tl.where(magnitude > _INF, nan_high, inf_high), top)
    return top | ((bits >> 16) & 0x8000), tl.where(magnitude >= _INF, 0, rest)


@triton.jit
def join(high, low, WIDTH: tl.constexpr, BF16: tl.constexpr):
    """The inverse of `split`, exact on what was stored: (high, low) in int32 to fp32 bits."""
    top = high & 0x7FFF
    fixed = (top << WIDTH) + low
    if BF16:
        magnitude = tl.where(top > (_INF >> 16), _NAN, fixed << (16 - WIDTH))
    else:
        if WIDTH == 8:
            normal = (fixed << 5) + _FP16_BIAS
            unit: tl.constexpr = 2.0**-32
        else:
            normal = (fixed >> 3) + _FP16_BIAS
            unit: tl.constexpr = 2.0**-40
        small = (fixed.to(tl.float32) * unit).to(tl.int32, bitcast=True)
        magnitude = tl.where(fixed >= (0x400 << WIDTH), normal, small)
        magnitude = tl.where((top == 0x7C00) & (low == 0), _INF, magnitude)
        magnitude = tl.where(top > 0x7C00, _NAN, magnitude)
    return magnitude | ((high & 0x8000) << 16)


@triton.jit
def _fp16_fixed(magnitude, WIDTH: tl.constexpr):
    # Below fp16's normal range: fixed point. The product is exact; rounding half up is truncation plus a comparison,
    # because adding 0.5 to an fp32 number above 2**23 would itself round.
    if WIDTH == 8:
        normal = (magnitude - _FP16_BIAS + 16) >> 5
        unit: tl.constexpr = 2.0**32
    else:
        normal = (magnitude - _FP16_BIAS) << 3
        unit: tl.constexpr = 2.0**40
    value = tl.where(magnitude < _FP16_MIN_NORMAL, magnitude, 0).to(tl.float32, bitcast=True) * unit
    whole = value.to(tl.int32)
    small = whole + tl.where(value - whole.to(tl.float32) >= 0.5, 1, 0)
    return tl.where(magnitude >= _FP16_MIN_NORMAL, normal, small)


@triton.jit
def _encode(x_ptr, high_ptr, low_ptr, flags_ptr, n: tl.int64, TILE: tl.constexpr, BF16: tl.constexpr):
    LOW: tl.constexpr = low_ptr.dtype.element_ty
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    bits = tl.load(x_ptr + offset, mask=offset < n, other=0)
    high, low = split(bits, LOW.primitive_bitwidth, BF16)
    tl.store(high_ptr + offset, high.to(tl.int16), mask=offset < n)
    tl.store(low_ptr + offset, low.to(LOW), mask=offset < n)
    if not BF16:
        magnitude = bits & _MAGNITUDE
        tl.store(flags_ptr + offset * 0, _OUT_OF_RANGE, mask=(magnitude >= _FP16_LIMIT) & (magnitude < _INF))


@triton.jit
def _decode(high_ptr, low_ptr, out_ptr, n: tl.int64, TILE: tl.constexpr, BF16: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    high = tl.load(high_ptr + offset, mask=offset < n, other=0).to(tl.int32)
    low = tl.load(low_ptr + offset, mask=offset < n, other=0).to(tl.int32)
    joined = join(high, low, low_ptr.dtype.element_ty.primitive_bitwidth, BF16)
    tl.store(out_ptr + offset, joined, mask=offset < n)


def encode_split(x: Tensor, high: Tensor, low: Tensor) -> int:
    """See `reference.splitting.encode_split`.

    Only an fp16 `high` can raise a flag, so only then does it synchronise.
    """
    n, bf16, flags = x.numel(), high.dtype == torch.bfloat16, flag_word(x)
    parts = high.view(torch.int16), low
    run(_encode, -(-n // TILE), x.view(torch.int32), *parts, flags, n, TILE=TILE, BF16=bf16)
    return 0 if bf16 else flags_on_host(flags)


def decode_split(high: Tensor, low: Tensor, out: Tensor) -> None:
    """See `reference.splitting.decode_split`."""
    n, bf16 = out.numel(), high.dtype == torch.bfloat16
    run(_decode, -(-n // TILE), high.view(torch.int16), low, out.view(torch.int32), n, TILE=TILE, BF16=bf16)
