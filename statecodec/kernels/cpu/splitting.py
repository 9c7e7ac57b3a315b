"""Split master weights for CPUs; the arithmetic is that of `reference.splitting`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statecodec.kernels import OUT_OF_RANGE
from statecodec.kernels.cpu.views import array_of, bits_of, kernel

_INF = np.int32(0x7F800000)
_NAN = np.int32(0x7FC00000)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_FP16_MIN_NORMAL = np.int32(0x38800000)
_FP16_BIAS = np.int32((127 - 15) << 23)
_FP16_LIMIT = np.int32(0x477FF000)


def encode_split(x: Tensor, high: Tensor, low: Tensor) -> int:
    """See `reference.splitting.encode_split`."""
    bits, top, rest = bits_of(x).reshape(-1), bits_of(high).reshape(-1), array_of(low).reshape(-1)
    wide = low.dtype == torch.int16
    if high.dtype == torch.bfloat16:
        (_split_bf16_16 if wide else _split_bf16_8)(bits, top, rest)
        return 0
    return OUT_OF_RANGE * int(_split_fp16(array_of(x).reshape(-1), bits, top, rest, 16 if wide else 8))


def decode_split(high: Tensor, low: Tensor, out: Tensor) -> None:
    """See `reference.splitting.decode_split`."""
    top, rest, bits = bits_of(high).reshape(-1), array_of(low).reshape(-1), bits_of(out).reshape(-1)
    wide = low.dtype == torch.int16
    if high.dtype == torch.bfloat16:
        (_join_bf16_16 if wide else _join_bf16_8)(top, rest, bits)
    else:
        _join_fp16(top, rest, bits, 16 if wide else 8)


@kernel
def _split_bf16_8(bits: NDArray[Any], high: NDArray[Any], low: NDArray[Any]) -> None:
    largest = np.int32((0x7F800000 >> 8) - 1)  # a finite value must not round up to infinity
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        fixed = min((magnitude + np.int32(0x80)) >> np.int32(8), largest)
        top = (fixed + np.int32(0x80)) >> np.int32(8)
        rest = fixed - (top << np.int32(8))
        special = magnitude >= _INF
        top = np.int32(0x7F80) if magnitude == _INF else (np.int32(0x7FC0) if magnitude > _INF else top)
        high[i] = np.int16(top | ((bits[i] >> np.int32(16)) & np.int32(0x8000)))
        low[i] = np.int8(np.int32(0) if special else rest)


@kernel
def _split_bf16_16(bits: NDArray[Any], high: NDArray[Any], low: NDArray[Any]) -> None:
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        top = (magnitude + np.int32(0x8000)) >> np.int32(16)
        rest = magnitude - (top << np.int32(16))
        special = magnitude >= _INF
        top = np.int32(0x7F80) if magnitude == _INF else (np.int32(0x7FC0) if magnitude > _INF else top)
        high[i] = np.int16(top | ((bits[i] >> np.int32(16)) & np.int32(0x8000)))
        low[i] = np.int16(np.int32(0) if special else rest)


@kernel
def _join_bf16_8(high: NDArray[Any], low: NDArray[Any], bits: NDArray[Any]) -> None:
    for i in range(bits.size):
        top = np.int32(high[i]) & np.int32(0x7FFF)
        magnitude = ((top << np.int32(8)) + np.int32(low[i])) << np.int32(8)
        magnitude = _NAN if top > np.int32(0x7F80) else magnitude
        bits[i] = magnitude | ((np.int32(high[i]) & np.int32(0x8000)) << np.int32(16))


@kernel
def _join_bf16_16(high: NDArray[Any], low: NDArray[Any], bits: NDArray[Any]) -> None:
    for i in range(bits.size):
        top = np.int32(high[i]) & np.int32(0x7FFF)
        magnitude = (top << np.int32(16)) + np.int32(low[i])
        magnitude = _NAN if top > np.int32(0x7F80) else magnitude
        bits[i] = magnitude | ((np.int32(high[i]) & np.int32(0x8000)) << np.int32(16))


@kernel
def _split_fp16(x: NDArray[Any], bits: NDArray[Any], high: NDArray[Any], low: NDArray[Any], width: int) -> bool:
    overflow = False
    unit, half = np.float64(2.0 ** (24 + width)), np.int32(1) << np.int32(width - 1)
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        special = magnitude >= _INF
        overflow |= _FP16_LIMIT <= magnitude < _INF
        clamped = min(magnitude, _FP16_LIMIT - np.int32(1))
        if clamped >= _FP16_MIN_NORMAL:
            shifted = clamped - _FP16_BIAS
            fixed = (shifted + np.int32(16)) >> np.int32(5) if width == 8 else shifted << np.int32(3)
        else:
            fixed = np.int32(np.float64(abs(x[i])) * unit + 0.5)
        top = (fixed + half) >> np.int32(width)
        rest = fixed - (top << np.int32(width))
        if special:
            top, rest = np.int32(0x7C00) if magnitude == _INF else np.int32(0x7E00), np.int32(0)
        high[i] = np.int16(top | ((bits[i] >> np.int32(16)) & np.int32(0x8000)))
        low[i] = rest
    return overflow


@kernel
def _join_fp16(high: NDArray[Any], low: NDArray[Any], bits: NDArray[Any], width: int) -> None:
    unit = np.float64(2.0 ** -(24 + width))
    for i in range(bits.size):
        top = np.int32(high[i]) & np.int32(0x7FFF)
        fixed = (top << np.int32(width)) + np.int32(low[i])
        if top > np.int32(0x7C00):
            magnitude = _NAN
        elif fixed == np.int32(0x7C00) << np.int32(width):
            magnitude = _INF
        elif fixed >= np.int32(0x400) << np.int32(width):
            magnitude = (fixed << np.int32(5) if width == 8 else fixed >> np.int32(3)) + _FP16_BIAS
        else:
            magnitude = np.float32(np.float64(fixed) * unit).view(np.int32)
        bits[i] = magnitude | ((np.int32(high[i]) & np.int32(0x8000)) << np.int32(16))
