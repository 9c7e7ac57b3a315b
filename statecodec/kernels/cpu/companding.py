"""Companded quantisation for CPUs; the arithmetic is that of `reference.companding`, operation by operation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from statecodec.kernels import INF, NAN, NEGATIVE
from statecodec.kernels.cpu.views import array_of, bits_of, kernel
from statecodec.kernels.curves import LINEAR, LOG, LOG2, SOFTSIGN, Curve

_INF_BITS = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_BF16_MAX = 0x7F7F
_C0, _C1, _C2, _C3 = (np.float32(c) for c in LOG2)
_ONE, _HALF = np.float32(1.0), np.float32(0.5)


def encode_companded(x: Tensor, codes: Tensor, scales: Tensor, *, curve: Curve, group: int) -> int:
    """See `reference.companding.encode_companded`."""
    rows, cols = x.shape
    if not rows or not cols:
        return 0
    packed = bits_of(codes).reshape(rows, -1)
    scratch = packed if curve.bits == 8 else np.empty((1, group + group % 2), np.uint8)
    flags = _encode(
        array_of(x), bits_of(x), packed, scratch, bits_of(scales).reshape(rows, -1), group, curve.kind, curve.top,
        curve.signed, curve.min_scale, curve.per_octave, float(curve.levels[1]), curve.bits == 4,
    )  # fmt: skip
    return int(flags)


def decode_companded(codes: Tensor, scales: Tensor, out: Tensor, *, curve: Curve, group: int) -> None:
    """See `reference.companding.decode_companded`."""
    rows, cols = out.shape
    if not rows or not cols:
        return
    scale_bits, target = bits_of(scales).reshape(rows, -1), array_of(out)
    raw = bits_of(codes).reshape(rows, -1)
    (_decode8 if curve.bits == 8 else _decode4)(raw, scale_bits, curve.table, target, group)


@kernel
def _encode(
    x: NDArray[Any], x_bits: NDArray[Any], packed: NDArray[Any], scratch: NDArray[Any], scales: NDArray[Any],
    group: int, kind: int, top: Any, signed: bool, min_scale: int, codes_per_octave: int, lowest: Any, nibbles: bool,
) -> int:  # fmt: skip
    rows, cols = x.shape
    flags = 0
    half_lowest = np.float32(lowest) * np.float32(0.5)
    for row in range(rows):
        for g in range(scales.shape[1]):
            start = g * group
            stop = min(start + group, cols)
            bits = x_bits[row, start:stop]
            absmax, negative = _absmax(bits)
            if absmax >= _INF_BITS:
                flags |= _nonfinite(bits)
            if negative and not signed:
                flags |= _negative(bits)
            scale_bits = _scale_bits(absmax, min_scale)
            scales[row, g] = np.int16(scale_bits)
            scale = np.int32(scale_bits << 16).view(np.float32)
            codes = scratch[0, : stop - start] if nibbles else packed[row, start:stop]
            values = x[row, start:stop]
            if scale_bits == 0:
                codes[:] = 0
            elif kind == SOFTSIGN:
                _softsign(values, codes, scale, np.float32(top), signed)
            elif kind == LOG:
                _log(values, codes, scale, top, codes_per_octave, half_lowest, signed)
            elif kind == LINEAR:
                _linear(values, codes, scale, np.float32(top), signed)
            else:
                _sqrt(values, codes, scale, np.float32(top), signed)
            if nibbles:
                _pack_nibbles(codes, packed[row, start // 2 : (stop + 1) // 2])
    return flags


@kernel
def _absmax(bits: NDArray[Any]) -> Any:
    # Magnitudes of floats order like their integers: integer max vectorises where float max must mind NaN.
    largest, signs = np.int32(0), np.int32(0)
    for i in range(bits.size):
        signs |= bits[i]
        largest = max(largest, bits[i] & np.int32(_MAGNITUDE))
    return largest, signs < 0


@kernel
def _nonfinite(bits: NDArray[Any]) -> int:
    flags = 0
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        if magnitude > _INF_BITS:
            flags |= NAN
        elif magnitude == _INF_BITS:
            flags |= INF
    return flags


@kernel
def _negative(bits: NDArray[Any]) -> int:
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        if bits[i] < 0 and 0 < magnitude <= _INF_BITS:  # -0.0 is a zero
            return NEGATIVE
    return 0


@kernel
def _scale_bits(absmax: Any, min_scale: int) -> Any:
    if absmax == 0:
        return 0
    wide = np.int64(absmax)
    return min(max((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16, min_scale), _BF16_MAX)


@kernel
def _store(codes: NDArray[Any], i: int, value: Any, y: Any, top: Any, signed: bool) -> None:
    code = np.int32(y * top + np.float32(0.5))
    if signed:
        codes[i] = np.uint8(-code if value < np.float32(0.0) else code)
    else:
        codes[i] = np.uint8(max(code, np.int32(1)) if value > np.float32(0.0) else np.int32(0))


@kernel
def _linear(values: NDArray[Any], codes: NDArray[Any], scale: Any, top: Any, signed: bool) -> None:
    for i in range(values.size):
        _store(codes, i, values[i], min(abs(values[i]) / scale, np.float32(1.0)), top, signed)


@kernel
def _softsign(values: NDArray[Any], codes: NDArray[Any], scale: Any, top: Any, signed: bool) -> None:
    for i in range(values.size):
        r = min(abs(values[i]) / scale, np.float32(1.0))
        _store(codes, i, values[i], (r + r) / (np.float32(1.0) + r), top, signed)


@kernel
def _sqrt(values: NDArray[Any], codes: NDArray[Any], scale: Any, top: Any, signed: bool) -> None:
    for i in range(values.size):
        _store(codes, i, values[i], np.sqrt(min(abs(values[i]) / scale, np.float32(1.0))), top, signed)


@kernel
def _log(
    values: NDArray[Any],
    codes: NDArray[Any],
    scale: Any,
    top: Any,
    codes_per_octave: int,
    half_lowest: Any,
    signed: bool,
) -> None:
    highest, per_octave, per_octave_float = np.int32(top), np.int32(codes_per_octave), np.float32(codes_per_octave)
    for i in range(values.size):
        r = min(abs(values[i]) / scale, _ONE)
        bits = np.float32(r).view(np.int32)
        f = np.int32((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000)).view(np.float32) - _ONE
        log2 = f * (_C0 + f * (_C1 + f * (_C2 + f * _C3)))
        octave = (bits >> np.int32(23)) - np.int32(127)
        code = highest + octave * per_octave + np.int32(log2 * per_octave_float + _HALF)
        code = max(min(code, highest), np.int32(1))
        if signed:
            code = code if r >= half_lowest else np.int32(0)
            codes[i] = np.uint8(-code if values[i] < np.float32(0.0) else code)
        else:
            codes[i] = np.uint8(code if values[i] > np.float32(0.0) else np.int32(0))


@kernel
def _pack_nibbles(codes: NDArray[Any], out: NDArray[Any]) -> None:
    pairs = codes.size // 2
    for i in range(pairs):
        out[i] = (codes[2 * i] & np.uint8(0xF)) | (codes[2 * i + 1] << np.uint8(4))
    if codes.size % 2:
        out[pairs] = codes[codes.size - 1] & np.uint8(0xF)


@kernel
def _decode8(raw: NDArray[Any], scales: NDArray[Any], table: NDArray[Any], out: NDArray[Any], group: int) -> None:
    rows, cols = out.shape
    for row in range(rows):
        for g in range(scales.shape[1]):
            start = g * group
            stop = min(start + group, cols)
            scale = np.int32(np.int32(scales[row, g]) << np.int32(16)).view(np.float32)
            codes, values = raw[row, start:stop], out[row, start:stop]
            for i in range(codes.size):
                values[i] = table[codes[i]] * scale


@kernel
def _decode4(raw: NDArray[Any], scales: NDArray[Any], table: NDArray[Any], out: NDArray[Any], group: int) -> None:
    rows, cols = out.shape
    for row in range(rows):
        for g in range(scales.shape[1]):
            start = g * group
            stop = min(start + group, cols)
            scale = np.int32(np.int32(scales[row, g]) << np.int32(16)).view(np.float32)
            codes, values = raw[row, start // 2 : (stop + 1) // 2], out[row, start:stop]
            pairs = values.size // 2
            for i in range(pairs):
                values[2 * i] = table[codes[i] & 0xF] * scale
                values[2 * i + 1] = table[codes[i] >> 4] * scale
            if values.size % 2:
                values[values.size - 1] = table[codes[pairs] & 0xF] * scale
