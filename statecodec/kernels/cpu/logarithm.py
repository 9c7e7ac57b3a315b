"""Log codes for CPUs; the arithmetic is that of `reference.logarithm`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from statecodec.kernels import NEGATIVE
from statecodec.kernels.cpu.grid import SPAN, furthest, has_negative, nonfinite_flags, sums
from statecodec.kernels.cpu.views import array_of, kernel
from statecodec.kernels.curves import LOG2
from statecodec.kernels.grids import LOWEST, LogGrid
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison

_INF_BITS, _NORMAL_BITS, _LIFT = np.int32(0x7F800000), np.int32(0x00800000), np.int32(32)
_C0, _C1, _C2, _C3 = (np.float32(c) for c in LOG2)
_ONE, _HALF, _RAISE = np.float32(1.0), np.float32(0.5), np.float32(2.0**32)
_FIRST = np.int32(127 + LOWEST)


def encode_logarithmic(x: Tensor, codes: Tensor, *, grid: LogGrid) -> tuple[int, Comparison]:
    """See `reference.logarithm.encode_logarithmic`."""
    values = array_of(x)
    bits = values.view(np.int32)
    sum_sq, sum_sq_diff, largest, bad = _encode(values, bits, _unsigned(codes), grid.every_code, grid.per_octave)
    flags = nonfinite_flags(bits) | NEGATIVE * has_negative(bits) if bad else 0
    if flags:
        return flags, NO_DIFFERENCE
    return 0, Comparison(sum_sq, sum_sq_diff, float(np.int32(largest).view(np.float32)), 0)


def decode_logarithmic(codes: Tensor, out: Tensor, *, grid: LogGrid) -> None:
    """See `reference.logarithm.decode_logarithmic`."""
    _values(_unsigned(codes), grid.every_code, array_of(out))


def _unsigned(codes: Tensor) -> NDArray[np.uint16]:
    return array_of(codes).view(np.uint16)


@kernel
def _encode(
    x: NDArray[Any], bits: NDArray[Any], codes: NDArray[Any], table: NDArray[Any], codes_per_octave: int
) -> Any:
    value = np.empty(SPAN, np.float32)
    sum_sq, sum_sq_diff, largest = 0.0, 0.0, np.int32(0)
    for start in range(0, x.size, SPAN):
        n = min(SPAN, x.size - start)
        source, target = x[start : start + n], codes[start : start + n]
        lowest, highest = _ends(bits[start : start + n])
        # A set sign may be that of -0.0, which is a zero.
        if (lowest < 0 or highest >= _INF_BITS) and _refused(bits[start : start + n]):
            return sum_sq, sum_sq_diff, largest, True
        _number(source, bits[start : start + n], target, codes_per_octave)
        _values(target, table, value[:n])
        part, part_diff = sums(source, value[:n])
        sum_sq += part
        sum_sq_diff += part_diff
        largest = max(largest, furthest(source, value[:n]))
    return sum_sq, sum_sq_diff, largest, False


@kernel
def _refused(bits: NDArray[Any]) -> bool:
    return has_negative(bits) or nonfinite_flags(bits) != 0


@kernel
def _ends(bits: NDArray[Any]) -> Any:
    """The least and the greatest bits: of numbers from 0 on these are the smallest and the largest."""
    lowest, highest = np.int32(0), np.int32(0)
    for i in range(bits.size):
        lowest = min(lowest, bits[i])
        highest = max(highest, bits[i])
    return lowest, highest


@kernel
def _number(x: NDArray[Any], bits: NDArray[Any], codes: NDArray[Any], codes_per_octave: int) -> None:
    per_octave, per_octave_float = np.int32(codes_per_octave), np.float32(codes_per_octave)
    for i in range(x.size):
        subnormal = bits[i] < _NORMAL_BITS
        lifted = np.float32(x[i] * _RAISE).view(np.int32) if subnormal else bits[i]  # exact
        f = np.int32((lifted & np.int32(0x7FFFFF)) | np.int32(0x3F800000)).view(np.float32) - _ONE
        log2 = f * (_C0 + f * (_C1 + f * (_C2 + f * _C3)))
        octave = (lifted >> np.int32(23)) - _FIRST - (_LIFT if subnormal else np.int32(0))
        code = np.int32(1) + octave * per_octave + np.int32(log2 * per_octave_float + _HALF)
        codes[i] = np.uint16(code if x[i] > np.float32(0.0) else np.int32(0))


@kernel
def _values(codes: NDArray[Any], table: NDArray[Any], out: NDArray[Any]) -> None:
    for i in range(codes.size):
        out[i] = table[codes[i]]
