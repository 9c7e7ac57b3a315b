"""Error sums for CPUs.

Unlike the codecs' kernels they may reassociate additions: they agree with `reference` up to rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statecodec.kernels.cpu.views import array_of, bits_of, summing_kernel
from statecodec.kernels.reference import statistics as reference
from statecodec.kernels.reference.statistics import Comparison, Size, UpdateComparison, UpdateSize

_SLICE = 256
_ONE, _INF = np.float32(1.0), np.float32(np.inf)


def compare(a: Tensor, b: Tensor) -> Comparison:
    """See `reference.statistics.compare`; fp32 runs here, fp64 there."""
    if a.dtype != torch.float32:
        return reference.compare(a, b)
    sum_sq, sum_sq_diff, largest, mismatched = _compare(array_of(a), array_of(b))
    return Comparison(sum_sq, sum_sq_diff, float(largest), int(mismatched))


def compare_updates(
    m: Tensor, v: Tensor, m_other: Tensor, v_other: Tensor, *, correction1: float, correction2: float, eps: float
) -> UpdateComparison:
    """See `reference.statistics.compare_updates`."""
    arrays = (array_of(m), array_of(v), array_of(m_other), array_of(v_other))
    sums = _compare_updates(*arrays, 1.0 / correction1, 1.0 / correction2, eps)
    a, b, c, d, largest, largest_other, nonfinite = sums
    return UpdateComparison(a, b, c, d, float(largest), float(largest_other), int(nonfinite))


def update_size(m: Tensor, v: Tensor, *, eps: float) -> UpdateSize:
    """See `reference.statistics.update_size`."""
    numel, sum_sq = _update_size(array_of(m).reshape(-1), array_of(v).reshape(-1), eps)
    return UpdateSize(int(numel), sum_sq)


def size(x: Tensor) -> Size:
    """See `reference.statistics.size`."""
    sum_sq, largest = _size(array_of(x), bits_of(x))
    return Size(sum_sq, float(np.int32(largest).view(np.float32)))


@summing_kernel
def _compare(a: NDArray[Any], b: NDArray[Any]) -> Any:
    sum_sq, sum_sq_diff, largest = 0.0, 0.0, np.int32(0)
    for start in range(0, a.size, _SLICE):
        x, y = a[start : start + _SLICE], b[start : start + _SLICE]
        part, part_diff = 0.0, 0.0
        for i in range(x.size):
            value = np.float64(x[i])
            difference = np.float64(y[i]) - value
            part += value * value
            part_diff += difference * difference
        sum_sq += part
        sum_sq_diff += part_diff
        for i in range(x.size):  # magnitudes order like their bits, and integer max vectorises
            largest = max(largest, np.float32(abs(y[i] - x[i])).view(np.int32))
    if sum_sq < np.inf and sum_sq_diff < np.inf:
        return sum_sq, sum_sq_diff, np.float64(np.int32(largest).view(np.float32)), 0
    return _compare_any(a, b)


@summing_kernel
def _compare_any(a: NDArray[Any], b: NDArray[Any]) -> Any:
    sum_sq, sum_sq_diff, largest, mismatched = 0.0, 0.0, 0.0, 0
    for i in range(a.size):
        x, y = np.float64(a[i]), np.float64(b[i])
        difference = abs(y - x)
        if difference < np.inf:
            sum_sq += x * x
            sum_sq_diff += difference * difference
            largest = max(largest, difference)
        elif not (x == y or (x != x and y != y)):
            mismatched += 1
    return sum_sq, sum_sq_diff, largest, mismatched


@summing_kernel
def _compare_updates(
    m: NDArray[Any], v: NDArray[Any], m2: NDArray[Any], v2: NDArray[Any], rate1: float, rate2: float, eps: float
) -> Any:
    sum_sq, sum_sq_other, sum_sq_diff, dot, nonfinite = 0.0, 0.0, 0.0, 0.0, 0
    largest, largest_other = np.int32(0), np.int32(0)
    u, w = np.empty(_SLICE, np.float32), np.empty(_SLICE, np.float32)
    for start in range(0, m.size, _SLICE):
        stop = min(start + _SLICE, m.size)
        _update(m[start:stop], v[start:stop], np.float32(rate1), np.float32(rate2), np.float32(eps), u)
        _update(m2[start:stop], v2[start:stop], np.float32(rate1), np.float32(rate2), np.float32(eps), w)
        part, part_other, part_diff, part_dot = 0.0, 0.0, 0.0, 0.0
        for i in range(stop - start):
            finite = abs(u[i]) < np.inf and abs(w[i]) < np.inf
            if not finite:
                u[i], w[i] = 0.0, 0.0
                nonfinite += 1
        for i in range(stop - start):
            difference = np.float64(w[i]) - np.float64(u[i])
            part_diff += difference * difference
        second = v[start:stop]
        for i in range(stop - start):
            if not (second[i] > 0 or abs(u[i]) < _ONE):
                u[i], w[i] = 0.0, 0.0
        for i in range(stop - start):
            x, y = np.float64(u[i]), np.float64(w[i])
            part += x * x
            part_other += y * y
            part_dot += x * y
        for i in range(stop - start):
            largest = max(largest, np.float32(abs(u[i])).view(np.int32))
            largest_other = max(largest_other, np.float32(abs(w[i])).view(np.int32))
        sum_sq, sum_sq_other = sum_sq + part, sum_sq_other + part_other
        sum_sq_diff, dot = sum_sq_diff + part_diff, dot + part_dot
    top = np.float64(np.int32(largest).view(np.float32))
    top_other = np.float64(np.int32(largest_other).view(np.float32))
    return sum_sq, sum_sq_other, sum_sq_diff, dot, top, top_other, nonfinite


@summing_kernel
def _update(m: NDArray[Any], v: NDArray[Any], rate1: Any, rate2: Any, eps: Any, u: NDArray[Any]) -> None:
    for i in range(m.size):
        u[i] = m[i] * rate1 / (np.sqrt(v[i] * rate2) + eps)


@summing_kernel
def _update_size(m: NDArray[Any], v: NDArray[Any], eps: float) -> Any:
    numel, sum_sq = 0, 0.0
    u = np.empty(_SLICE, np.float32)
    for start in range(0, m.size, _SLICE):
        stop = min(start + _SLICE, m.size)
        first, second = m[start:stop], v[start:stop]
        _update(first, second, np.float32(1.0), np.float32(1.0), np.float32(eps), u)
        part, count = 0.0, 0
        for i in range(stop - start):
            sound = abs(u[i]) < (_INF if second[i] > 0 else _ONE)
            value = np.float64(u[i]) if sound else 0.0
            part += value * value
            count += 1 if sound else 0
        numel, sum_sq = numel + count, sum_sq + part
    return numel, sum_sq


@summing_kernel
def _size(x: NDArray[Any], bits: NDArray[Any]) -> Any:
    sum_sq, largest = 0.0, np.int32(0)
    for start in range(0, x.size, _SLICE):
        stop = min(start + _SLICE, x.size)
        piece, piece_bits = x[start:stop], bits[start:stop]
        for i in range(piece.size):  # magnitudes order like their bits, and integer max vectorises
            magnitude = piece_bits[i] & np.int32(0x7FFFFFFF)
            largest = max(largest, magnitude if magnitude < np.int32(0x7F800000) else np.int32(0))
        part = 0.0
        for i in range(piece.size):
            value = np.float64(piece[i]) if abs(piece[i]) < np.inf else 0.0
            part += value * value
        sum_sq += part
    return sum_sq, largest
