"""Group-wise companded quantisation (FlashOptim section 3.2, with the deviations of docs/codecs.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from statecodec.kernels import INF, NAN, NEGATIVE
from statecodec.kernels.curves import LINEAR, LOG, LOG2, SOFTSIGN, Curve
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BF16_MAX_BITS = 0x7F7F


def encode_companded(x: Tensor, codes: Tensor, scales: Tensor, *, curve: Curve, group: int) -> int:
    """Quantise groups of values along each row.

    Args:
        x: fp32, rows x cols.
        codes: Written: int8 (signed curves of 8 bits) or uint8; rows x cols, or rows x ceil(cols / 2) with two 4-bit
            codes a byte, low nibble first.
        scales: Written: bf16, rows x ceil(cols / group).
        curve: The companding curve.
        group: Values per scale.

    Returns:
        The flags NAN | INF | NEGATIVE of what could not be encoded.

    Source:
        FlashOptim (arXiv 2602.23349), section 3.2, with the deviations of docs/codecs.md.

    Example:
        >>> codes, scales = torch.zeros(1, 2, dtype=torch.int8), torch.zeros(1, 1, dtype=torch.bfloat16)
        >>> curve = Curve("softsign", 8, signed=True)
        >>> encode_companded(torch.tensor([[1.0, -0.5]]), codes, scales, curve=curve, group=2)
        0
        >>> codes.tolist()
        [[127, -85]]
    """
    rows, cols = x.shape
    if not x.numel():
        return 0
    groups = -(-cols // group)
    padded = torch.nn.functional.pad(x, (0, groups * group - cols)).view(rows, groups, group)
    magnitude = padded.abs()
    flags = _flags(x, curve)
    if flags:
        return flags
    scale_bits = _scale_bits(magnitude.amax(-1), curve)
    scales.view(torch.int16).copy_(scale_bits.to(torch.int16).view(scales.shape))
    scale = (scale_bits << 16).to(torch.int32).view(torch.float32).unsqueeze(-1)
    r = torch.where(scale > 0, magnitude / scale, torch.zeros_like(magnitude)).clamp(max=1.0)
    code = _codes(r, curve)
    if not curve.signed:
        code = torch.where(magnitude > 0, code.clamp(min=1), code)
    else:
        code = torch.where(padded < 0, -code, code)
    code = code.view(rows, groups * group)[:, :cols]
    if curve.bits == 8:
        codes.view(torch.uint8).copy_((code & 0xFF).to(torch.uint8).view(codes.shape))
    else:
        even = torch.nn.functional.pad(code & 0xF, (0, cols % 2))
        codes.view(torch.uint8).copy_((even[:, 0::2] | (even[:, 1::2] << 4)).to(torch.uint8).view(codes.shape))
    return 0


def decode_companded(codes: Tensor, scales: Tensor, out: Tensor, *, curve: Curve, group: int) -> None:
    """The inverse of `encode_companded`: out = table[code] * scale, one fp32 multiplication per element.

    Args:
        codes: As written.
        scales: As written.
        out: Written: fp32, rows x cols.
        curve: The companding curve.
        group: Values per scale.
    """
    rows, cols = out.shape
    if not out.numel():
        return
    raw = codes.view(torch.uint8).view(rows, -1).to(torch.int64)
    if curve.bits == 4:
        raw = torch.stack((raw & 0xF, raw >> 4), -1).view(rows, -1)[:, :cols]
    table = torch.from_numpy(curve.table).to(out.device)
    scale = scales.view(rows, -1).to(torch.float32).repeat_interleave(group, -1)[:, :cols]
    out.copy_(table[raw] * scale)


def _flags(x: Tensor, curve: Curve) -> int:
    flags = NAN * bool(x.isnan().any()) | INF * bool(x.isinf().any())
    return flags | (NEGATIVE if not curve.signed and bool((x < 0).any()) else 0)


def _scale_bits(absmax: Tensor, curve: Curve) -> Tensor:
    """bf16 bits (int64) of the largest magnitude: to nearest even, finite, and never 0 for a non-zero group."""
    bits = absmax.contiguous().view(torch.int32).to(torch.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.where(bits > 0, rounded.clamp(curve.min_scale, BF16_MAX_BITS), torch.zeros_like(bits))


def _codes(r: Tensor, curve: Curve) -> Tensor:
    """Codes of magnitudes r in [0, 1], int64. Every operation is correctly rounded, so that backends agree."""
    if curve.kind == LOG:
        return _log_codes(r, curve)
    if curve.kind == LINEAR:
        y = r
    elif curve.kind == SOFTSIGN:
        y = (r + r) / (1.0 + r)
    else:
        y = r.to(torch.float64).sqrt().to(torch.float32)  # torch's fp32 sqrt is not correctly rounded on CPUs
    return (y * float(curve.top) + 0.5).floor().to(torch.int64)


def _log_codes(r: Tensor, curve: Curve) -> Tensor:
    bits = r.contiguous().view(torch.int32)
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1.0
    c0, c1, c2, c3 = LOG2
    log2 = fraction * (c0 + fraction * (c1 + fraction * (c2 + fraction * c3)))
    within = (log2 * float(curve.per_octave) + 0.5).floor().to(torch.int64)
    code = curve.top + ((bits >> 23).to(torch.int64) - 127) * curve.per_octave + within
    code = code.clamp(1, curve.top)
    return torch.where(r >= curve.half_lowest, code, torch.zeros_like(code))
