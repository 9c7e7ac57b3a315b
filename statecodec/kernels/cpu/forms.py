"""The choice of a form for CPUs, in one call: what is in no cache yet costs more than the arithmetic.

The arithmetic is that of `reference.forms`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statecodec.kernels.cpu.terms import centre_terms, zigzag
from statecodec.kernels.cpu.views import Memory, array_of, kernel
from statecodec.kernels.reference.forms import (
    CENTRE_FROM,
    CENTRE_WORTH,
    EXCEPTION,
    FASTER,
    FEW,
    MATCHES,
    OFTEN,
    RARE,
    sample,
)
from statecodec.kernels.reference.narrowing import LOW_BITS, Form, Narrowing

_BIAS = 1 / (2 * math.log(2))
_NOTHING = np.empty((0, 0), np.int16)


def form_of(codes: Memory) -> Form | None:
    """See `reference.forms.form_of`."""
    array = array_of(codes)
    top, left, height, width = sample(*array.shape)
    sampled = np.ascontiguousarray(array[top : top + height, left : left + width])
    centre = array.itemsize == 2 and min(height, width) >= CENTRE_FROM
    low, nibbles, terms, cost = _form_of(sampled.reshape(-1).astype(np.int32), sampled if centre else _NOTHING)
    return Form(Narrowing(array.shape[1] if terms else 0, low, nibbles), cost / sampled.size) if low >= 0 else None


@kernel
def _form_of(sampled: NDArray[Any], matrix: NDArray[Any]) -> Any:
    """Low bits, whether nibbles, whether terms are taken out, and the cost; `matrix` is the sample, or has no rows."""
    folded = np.empty(sampled.size, np.uint32)
    for i in range(sampled.size):
        folded[i] = zigzag(sampled[i])
    lengths = _lengths(folded)
    rows, cols = matrix.shape
    if rows:
        rest = np.empty((rows, cols), np.uint16)
        if not centre_terms(matrix, np.empty((1, cols), np.uint16), np.empty(rows, np.uint16), rest):
            rest[:] = 0xFFFF
        residuals, flat = np.empty(folded.size, np.uint32), rest.reshape(-1)
        for i in range(flat.size):
            residuals[i] = flat[i]
        shorter = _lengths(residuals)
        if _mean(shorter) + CENTRE_WORTH < _mean(lengths):
            low, nibbles, cost = _best(residuals, shorter)
            return low, nibbles, True, cost
    low, nibbles, cost = _best(folded, lengths)
    return low, nibbles, False, cost


@kernel
def _lengths(folded: NDArray[Any]) -> Any:
    counts = np.zeros(33, np.int64)
    for i in range(folded.size):
        # The exponent of an exact number.
        length = (np.float64(folded[i]).view(np.int64) >> 52) - 1022 if folded[i] else 0
        counts[length] += 1
    return counts


@kernel
def _mean(lengths: NDArray[Any]) -> Any:
    total, count = np.int64(0), np.int64(0)
    for i in range(lengths.size):
        total += i * lengths[i]
        count += lengths[i]
    return total / count


@kernel
def _best(folded: NDArray[Any], lengths: NDArray[Any]) -> Any:
    """Low bits (-1: no form), whether nibbles, and the cost."""
    best, least, nibbles = -1, np.inf, False
    for few in (False, True):
        before = -1
        for share in (OFTEN, RARE):
            low = _fewest(lengths, 4 if few else 8, folded.size // share)
            if low >= 0 and low != before:
                cost = _bits(folded, low, few) * (FASTER if few else 1.0)
                if cost < least:
                    best, least, nibbles = low, cost, few
            before = low
    return best, nibbles, least


@kernel
def _fewest(lengths: NDArray[Any], bits: int, most: int) -> int:
    for low in LOW_BITS:
        longer = np.int64(0)
        for i in range(low + bits + 1, lengths.size):
            longer += lengths[i]
        if longer <= most:
            return low
    return -1


@kernel
def _bits(folded: NDArray[Any], low: int, nibbles: bool) -> Any:
    n, escape = folded.size, 15 if nibbles else 255
    counts = np.zeros(256, np.int64)
    for i in range(n):
        symbol: Any = min(np.int64(folded[i] >> np.uint32(low)), escape)
        counts[symbol] += 1
    bits, used = n * math.log2(n), 0
    for symbol in range(256):
        if counts[symbol]:
            bits -= counts[symbol] * math.log2(counts[symbol])
            used += 1
    if not nibbles:
        bits += used * _BIAS
        bits *= MATCHES if bits < FEW * n else 1.0
    return low * n + bits + EXCEPTION * counts[escape]
