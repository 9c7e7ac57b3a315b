"""Master weights as a 16-bit float and a correction, in integer arithmetic on the bits.

With 16-bit corrections nothing is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from statecodec.kernels import OUT_OF_RANGE
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

INF_BITS = 0x7F800000
NAN_BITS = 0x7FC00000
FP16_MIN_NORMAL = 0x38800000  # fp32 bits of 2**-14
FP16_BIAS = (127 - 15) << 23  # fp32 bits minus this, shifted right by 13, are fp16 bits


def encode_split(x: Tensor, high: Tensor, low: Tensor) -> int:
    """Split values into a 16-bit float and what it lacks.

    bf16: 24 or 32 of fp32's bits, `high` rounded half away from zero in magnitude, `low` the difference. fp16: exponent
    re-biased; below 2**-14 fixed point in units of 2**-32 (8 bits) or 2**-40 (16 bits). NaN becomes the canonical NaN.

    Args:
        x: fp32, flat.
        high: Written: bf16 or fp16, of the same shape.
        low: Written: int8 or int16, of the same shape.

    Returns:
        OUT_OF_RANGE if fp16 cannot hold a finite value, else 0.

    Source:
        FlashOptim (arXiv 2602.23349), section 3.1, in integers in place of its floating-point form.
    """
    bits = x.view(torch.int32).to(torch.int64)
    sign, magnitude = bits >> 31 & 1, bits & 0x7FFFFFFF
    nan, inf = magnitude > INF_BITS, magnitude == INF_BITS
    width = 8 * low.dtype.itemsize
    if high.dtype == torch.bfloat16:
        fixed = _narrow(magnitude.clamp(max=INF_BITS - 1), 16 - width)
        fixed = fixed.clamp(max=(INF_BITS >> (16 - width)) - 1)
        flags, inf_high, nan_high = 0, INF_BITS >> 16, NAN_BITS >> 16
    else:
        finite = torch.where(nan | inf, torch.zeros_like(magnitude), magnitude)
        flags = OUT_OF_RANGE if bool((finite >= 0x477FF000).any()) else 0  # 65520: would round to infinity
        fixed, inf_high, nan_high = _fp16_fixed(finite.clamp(max=0x477FEFFF), width), 0x7C00, 0x7E00
    top = (fixed + (1 << (width - 1))) >> width
    rest = fixed - (top << width)
    top = torch.where(nan, nan_high, torch.where(inf, inf_high, top))
    rest = torch.where(nan | inf, torch.zeros_like(rest), rest)
    high.view(torch.int16).copy_((top | sign << 15).to(torch.int16))
    low.copy_(rest.to(low.dtype))
    return flags


def decode_split(high: Tensor, low: Tensor, out: Tensor) -> None:
    """The inverse of `encode_split`, exact on what was stored.

    Args:
        high: As written.
        low: As written.
        out: Written: fp32, flat.
    """
    width = 8 * low.dtype.itemsize
    bits = high.view(torch.int16).to(torch.int64) & 0xFFFF
    sign, top = bits >> 15, bits & 0x7FFF
    fixed = (top << width) + low.to(torch.int64)
    if high.dtype == torch.bfloat16:
        special = top > (INF_BITS >> 16)
        magnitude = torch.where(special, torch.full_like(top, NAN_BITS), fixed << (16 - width))
    else:
        magnitude = _fp16_magnitude(top, fixed, width)
    out.view(torch.int32).copy_((magnitude | sign << 31).to(torch.int32))


def _narrow(value: Tensor, drop: int) -> Tensor:
    """value / 2**drop, rounded half up."""
    return (value + (1 << drop >> 1)) >> drop


def _fp16_fixed(magnitude: Tensor, width: int) -> Tensor:
    """fp16-like integers with `width` further bits below the fp16 mantissa's last place."""
    # int16 holds the 13 bits that fp32 has below fp16's mantissa with 3 to spare: those stay zero.
    normal = _narrow(magnitude - FP16_BIAS, 5) if width == 8 else (magnitude - FP16_BIAS) << 3
    value = magnitude.to(torch.int32).view(torch.float32).to(torch.float64)
    small = (value * 2.0 ** (24 + width) + 0.5).floor().to(torch.int64)
    return torch.where(magnitude >= FP16_MIN_NORMAL, normal, small)


def _fp16_magnitude(top: Tensor, fixed: Tensor, width: int) -> Tensor:
    normal = (fixed << 5 if width == 8 else fixed >> 3) + FP16_BIAS
    small = (fixed.to(torch.float64) * 2.0 ** -(24 + width)).to(torch.float32).view(torch.int32).to(torch.int64)
    magnitude = torch.where(fixed >= (0x400 << width), normal, small)
    magnitude = torch.where((top == 0x7C00) & (fixed == 0x7C00 << width), torch.full_like(top, INF_BITS), magnitude)
    return torch.where(top > 0x7C00, torch.full_like(top, NAN_BITS), magnitude)
