"""Uniform quantisation for CPUs; the arithmetic is that of `reference.grid`, operation by operation.

Each loop has at most four arrays and no float sums, or LLVM does not vectorise it; sums go over the same span again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from statecodec.kernels import INF, NAN, NEGATIVE
from statecodec.kernels.cpu.views import array_of, kernel, summing_kernel
from statecodec.kernels.grids import LARGEST_BITS, LIMIT, Grid
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison

SPAN = 4096  # of fp32: what a loop wrote is still in the first-level cache for the next
_MAGNITUDE, _INF_BITS = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_LIMIT, _LARGEST_BITS = np.int32(LIMIT), np.int32(LARGEST_BITS)
_LARGEST = np.float32(np.finfo(np.float32).max)
_HALF, _ZERO = np.float32(0.5), np.float32(0.0)


def encode_uniform(x: Tensor, codes: Tensor, *, grid: Grid) -> tuple[int, Comparison]:
    """See `reference.grid.encode_uniform`."""
    values = array_of(x)
    bits = values.view(np.int32)
    sums = _encode_uniform(values, bits, array_of(codes), *_numbers(grid))
    return _result(sums, nonfinite_flags(bits) if sums[3] else 0)


def decode_uniform(codes: Tensor, out: Tensor, *, grid: Grid) -> None:
    """See `reference.grid.decode_uniform`."""
    width, _, threshold = _numbers(grid)
    _values(array_of(codes), array_of(out), width, threshold)


def encode_direction(m: Tensor, v: Tensor, codes: Tensor, *, grid: Grid, eps: float) -> tuple[int, Comparison]:
    """See `reference.grid.encode_direction`."""
    first, second = array_of(m), array_of(v)
    bits = second.view(np.int32)
    sums = _encode_direction(first, second, bits, array_of(codes), np.float32(eps), *_numbers(grid))
    flags = 0
    if sums[3]:
        flags = nonfinite_flags(first.view(np.int32)) | nonfinite_flags(bits) | NEGATIVE * has_negative(bits)
        flags = flags or INF  # finite moments whose ratio is not
    return _result(sums, flags)


def decode_direction(codes: Tensor, v: Tensor, out: Tensor, *, grid: Grid, eps: float) -> None:
    """See `reference.grid.decode_direction`."""
    width, _, threshold = _numbers(grid)
    _decode_direction(array_of(codes), array_of(v), array_of(out), np.float32(eps), width, threshold)


def _numbers(grid: Grid) -> tuple[Any, Any, Any]:
    return np.float32(grid.width), np.float32(grid.per_unit), np.int32(grid.threshold)


def _result(sums: Any, flags: int) -> tuple[int, Comparison]:
    if flags:
        return flags, NO_DIFFERENCE
    sum_sq, sum_sq_diff, largest, _ = sums
    return 0, Comparison(sum_sq, sum_sq_diff, float(np.int32(largest).view(np.float32)), 0)


@kernel
def _encode_uniform(
    x: NDArray[Any], bits: NDArray[Any], codes: NDArray[Any], width: Any, per_unit: Any, threshold: Any
) -> Any:
    value = np.empty(SPAN, np.float32)
    sum_sq, sum_sq_diff, largest = 0.0, 0.0, np.int32(0)
    for start in range(0, x.size, SPAN):
        n = min(SPAN, x.size - start)
        source, target = x[start : start + n], codes[start : start + n]
        top = _top(bits[start : start + n])
        if top >= _INF_BITS:
            return sum_sq, sum_sq_diff, largest, True
        if top < threshold:
            _near(source, target, value[:n], per_unit, width)
        else:
            _number(source, bits[start : start + n], target, per_unit, threshold)
            _values(target, value[:n], width, threshold)
        part, part_diff = sums(source, value[:n])
        sum_sq += part
        sum_sq_diff += part_diff
        largest = max(largest, furthest(source, value[:n]))
    return sum_sq, sum_sq_diff, largest, False


@kernel
def _encode_direction(
    m: NDArray[Any], v: NDArray[Any], v_bits: NDArray[Any], codes: NDArray[Any], eps: Any, width: Any, per_unit: Any,
    threshold: Any,
) -> Any:  # fmt: skip
    direction, value = np.empty(SPAN, np.float32), np.empty(SPAN, np.float32)
    bits = direction.view(np.int32)
    sum_sq, sum_sq_diff, largest = 0.0, 0.0, np.int32(0)
    for start in range(0, m.size, SPAN):
        n = min(SPAN, m.size - start)
        source, target = direction[:n], codes[start : start + n]
        _direction(m[start : start + n], v[start : start + n], source, eps)
        # A NaN or an infinite root shows in v; a NaN or infinite moment in the direction.
        top = _top(bits[:n])
        if _top(v_bits[start : start + n]) >= _INF_BITS or top >= _INF_BITS:
            return sum_sq, sum_sq_diff, largest, True
        if top < threshold:
            _near(source, target, value[:n], per_unit, width)
        else:
            _number(source, bits[:n], target, per_unit, threshold)
            _values(target, value[:n], width, threshold)
        part, part_diff = sums(source, value[:n])
        sum_sq += part
        sum_sq_diff += part_diff
        largest = max(largest, furthest(source, value[:n]))
    return sum_sq, sum_sq_diff, largest, False


@kernel
def _top(bits: NDArray[Any]) -> Any:
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & _MAGNITUDE)
    return largest


@kernel
def _direction(m: NDArray[Any], v: NDArray[Any], out: NDArray[Any], eps: Any) -> None:
    for i in range(m.size):
        out[i] = m[i] / (np.sqrt(v[i]) + eps)


@kernel
def _near(x: NDArray[Any], codes: NDArray[Any], values: NDArray[Any], per_unit: Any, width: Any) -> None:
    """Codes and their values where all magnitudes are below the threshold, as nearly always."""
    for i in range(x.size):
        number = np.int32(min(abs(x[i]) * per_unit, np.float32(LIMIT)) + _HALF)
        code = -number if x[i] < _ZERO else number
        codes[i] = code
        values[i] = np.float32(code) * width


@kernel
def _number(x: NDArray[Any], bits: NDArray[Any], codes: NDArray[Any], per_unit: Any, threshold: Any) -> None:
    for i in range(x.size):
        magnitude = bits[i] & _MAGNITUDE
        near = min(abs(x[i]) * per_unit, np.float32(LIMIT))  # where it is not near, it may not fit an integer
        exact = _LIMIT + (magnitude - threshold)
        number = np.int32(near + _HALF) if magnitude < threshold else exact
        codes[i] = -number if x[i] < _ZERO else number


@kernel
def _values(codes: NDArray[Any], out: NDArray[Any], width: Any, threshold: Any) -> None:
    for i in range(codes.size):
        number = abs(max(codes[i], -_MAGNITUDE))
        bits = threshold + min(max(number - _LIMIT, np.int32(0)), _LARGEST_BITS - threshold)
        magnitude = np.float32(number) * width if number < _LIMIT else np.int32(bits).view(np.float32)
        out[i] = -magnitude if codes[i] < 0 else magnitude


@kernel
def _decode_direction(
    codes: NDArray[Any], v: NDArray[Any], out: NDArray[Any], eps: Any, width: Any, threshold: Any
) -> None:
    for start in range(0, codes.size, SPAN):
        target = out[start : start + SPAN]
        _values(codes[start : start + SPAN], target, width, threshold)
        _times_root(target, v[start : start + SPAN], eps)


@kernel
def _times_root(values: NDArray[Any], v: NDArray[Any], eps: Any) -> None:
    for i in range(values.size):
        values[i] = min(max(values[i] * (np.sqrt(v[i]) + eps), -_LARGEST), _LARGEST)


@summing_kernel
def sums(x: NDArray[Any], value: NDArray[Any]) -> Any:
    """Sums of x**2 and of (value - x)**2, in fp64."""
    sum_sq, sum_sq_diff = 0.0, 0.0
    for i in range(x.size):
        a = np.float64(x[i])
        difference = np.float64(value[i]) - a
        sum_sq += a * a
        sum_sq_diff += difference * difference
    return sum_sq, sum_sq_diff


@kernel
def furthest(x: NDArray[Any], value: NDArray[Any]) -> Any:
    """Bits of the largest difference: magnitudes order like their bits, and integer max vectorises."""
    largest = np.int32(0)
    for i in range(x.size):
        largest = max(largest, np.float32(abs(value[i] - x[i])).view(np.int32))
    return largest


@kernel
def nonfinite_flags(bits: NDArray[Any]) -> int:
    """NAN | INF of what fp32 bits hold."""
    flags = 0
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        if magnitude > _INF_BITS:
            flags |= NAN
        elif magnitude == _INF_BITS:
            flags |= INF
    return flags


@kernel
def has_negative(bits: NDArray[Any]) -> bool:
    """Whether fp32 bits hold a number below zero."""
    negative = False
    for i in range(bits.size):
        negative |= bits[i] < 0 and 0 < bits[i] & _MAGNITUDE <= _INF_BITS
    return negative
