"""Narrowing for CPUs; the arithmetic is that of `reference.narrowing`.

Codes pass through a span of 32-bit numbers, folded, that stays in the first-level cache; each loop has one output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from statecodec.kernels.cpu.views import array_of, kernel
from statecodec.kernels.reference.narrowing import BLOCK_ROWS, Narrowing

_SPAN = 4096  # a multiple of what the bits and nibbles of a byte belong to
_UNSIGNED = {2: np.uint16, 4: np.uint32}


def narrow(codes: Tensor, narrowing: Narrowing, parts: Mapping[str, Tensor], exceptions: Tensor) -> int:
    """See `reference.narrowing.narrow`."""
    source, centred = array_of(codes), narrowing.cols > 0
    if centred:
        columns, lines = (array_of(parts[name]).view(np.uint16) for name in ("columns", "lines"))
        folded = _centred(source.reshape(-1, narrowing.cols), columns, lines)
        if folded is None:
            return -1
        source = folded
    extra = array_of(exceptions).view(_UNSIGNED[codes.element_size()])
    whole, bits, symbols = (array_of(parts[name]) for name in ("bytes", "bits", "symbols"))
    return int(_narrow(source, whole, bits, symbols, extra, narrowing.low, narrowing.nibbles, not centred))


def widen(parts: Mapping[str, Tensor], exceptions: Tensor, narrowing: Narrowing, codes: Tensor) -> bool:
    """See `reference.narrowing.widen`."""
    target, centred = array_of(codes), narrowing.cols > 0
    extra = array_of(exceptions).view(_UNSIGNED[codes.element_size()])
    whole, bits, symbols = (array_of(parts[name]) for name in ("bytes", "bits", "symbols"))
    if not _widen(whole, bits, symbols, extra, narrowing.low, narrowing.nibbles, not centred, target):
        return False
    if centred:
        columns, lines = (array_of(parts[name]).view(np.uint16) for name in ("columns", "lines"))
        _uncentre(target.reshape(-1, narrowing.cols), columns.reshape(-1, narrowing.cols), lines)
    return True


def _centred(matrix: NDArray[Any], columns: NDArray[Any], lines: NDArray[Any]) -> NDArray[Any] | None:
    """Folded residuals plus 1, flat; None if one does not fit."""
    folded = np.empty(matrix.shape, np.uint16)
    fits = centre_terms(matrix, columns.reshape(-1, matrix.shape[1]), lines, folded)
    return folded.reshape(-1) if fits else None


@kernel
def zigzag(x: Any) -> Any:
    return np.uint32((x << np.int32(1)) ^ (x >> np.int32(31)))


@kernel
def _unzigzag(x: Any) -> Any:
    return np.int32(x >> np.uint32(1)) ^ -np.int32(x & np.uint32(1))


@kernel
def _rounded(total: Any, count: Any) -> Any:
    """total / count rounded half up; 0 of nothing."""
    return (2 * total + count) // (2 * count) if count else np.int64(0)


@kernel
def centre_terms(codes: NDArray[Any], columns: NDArray[Any], lines: NDArray[Any], folded: NDArray[Any]) -> bool:
    rows, cols = codes.shape
    before, line_before, fits = np.zeros(cols, np.int32), np.int64(0), True
    for block in range(columns.shape[0]):
        start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, rows)
        _column_terms(codes[start:stop], before, columns[block])
        for row in range(start, stop):
            line = _line_term(codes[row], before)
            lines[row] = np.uint16(zigzag(np.int32(np.int16(line - line_before))))
            line_before = line
            fits &= _residual(codes[row], before, np.int32(line), folded[row])
    return fits


@kernel
def _column_terms(codes: NDArray[Any], before: NDArray[Any], stored: NDArray[Any]) -> None:
    """Replace the terms of the block before by those of this one; leave what changed, folded, in `stored`."""
    rows, cols = codes.shape
    sums, counts = np.zeros(cols, np.int32), np.zeros(cols, np.int32)
    for row in range(rows):
        line = codes[row]
        for j in range(cols):
            sums[j] += np.int32(line[j])
        for j in range(cols):
            counts[j] += np.int32(line[j] != 0)
    total, there = np.int64(0), np.int64(0)
    for j in range(cols):
        sums[j] = np.int32(_rounded(np.int64(sums[j]), np.int64(counts[j])))
        total += sums[j]
        there += counts[j] > 0
    level = np.int32(_rounded(total, there))
    for j in range(cols):
        term = sums[j] - level if counts[j] else before[j]
        stored[j] = np.uint16(zigzag(np.int32(np.int16(term - before[j]))))
        before[j] = term


@kernel
def _line_term(codes: NDArray[Any], terms: NDArray[Any]) -> Any:
    total, there = np.int64(0), np.int64(0)
    for start in range(0, codes.size, _SPAN):
        piece, term = codes[start : start + _SPAN], terms[start : start + _SPAN]
        part, count = np.int32(0), np.int32(0)  # in 32 bits they vectorise
        for j in range(piece.size):
            part += np.int32(piece[j]) - term[j] if piece[j] != 0 else np.int32(0)
            count += np.int32(piece[j] != 0)
        total += part
        there += count
    return _rounded(total, there)


@kernel
def _residual(codes: NDArray[Any], terms: NDArray[Any], line: Any, folded: NDArray[Any]) -> bool:
    """Folded residuals plus 1, 0 for codes of 0. False if a residual plus 1 does not fit."""
    beyond = False
    for j in range(codes.size):
        rest = np.int32(np.int16(np.int32(codes[j]) - terms[j] - line))
        beyond |= rest == np.int32(-32768) and codes[j] != 0
        folded[j] = np.uint16(np.uint32(0) if codes[j] == 0 else zigzag(rest) + np.uint32(1))
    return not beyond


@kernel
def _uncentre(codes: NDArray[Any], columns: NDArray[Any], lines: NDArray[Any]) -> None:
    """In place: folded residuals to codes."""
    rows, cols = codes.shape
    terms, line = np.zeros(cols, np.int32), np.int32(0)
    for row in range(rows):
        if row % BLOCK_ROWS == 0:
            changes = columns[row // BLOCK_ROWS]
            for j in range(cols):
                terms[j] += _unzigzag(np.uint32(changes[j]))
        line += _unzigzag(np.uint32(lines[row]))
        line_codes = codes[row]
        for j in range(cols):
            folded = np.uint32(np.uint16(line_codes[j]))
            value = _unzigzag(folded - np.uint32(1)) + terms[j] + line
            line_codes[j] = np.int16(np.int32(0) if folded == 0 else value)


@kernel
def _narrow(
    source: NDArray[Any], whole: NDArray[Any], bits: NDArray[Any], symbols: NDArray[Any], exceptions: NDArray[Any],
    low: int, nibbles: bool, fold: bool,
) -> int:  # fmt: skip
    span, rest = np.empty(_SPAN, np.uint32), np.empty(_SPAN, np.uint32)
    escape, count, width = np.uint32(15 if nibbles else 255), 0, low % 8
    for start in range(0, source.size, _SPAN):
        piece = source[start : start + _SPAN]
        n = piece.size
        if fold:
            for i in range(n):
                span[i] = zigzag(np.int32(piece[i]))
        else:
            for i in range(n):
                span[i] = piece[i]
        largest = np.uint32(0)
        for i in range(n):
            rest[i] = span[i] >> np.uint32(low)
            largest = max(largest, rest[i])
        if low >= 8:
            _put_bytes(span[:n], whole[start : start + n])
        if width:
            per = 8 // width
            span[n:] = 0
            _put_bits(span, np.uint32(low - width), width, bits[start // per : (start + n + per - 1) // per])
        if largest >= escape:
            for i in range(n):
                if rest[i] >= escape:
                    if count == exceptions.size:
                        return -1
                    exceptions[count] = rest[i]
                    rest[i] = escape
                    count += 1
        if nibbles:
            rest[n:] = 0
            _put_nibbles(rest, symbols[start // 2 : (start + n + 1) // 2])
        else:
            _put_bytes(rest[:n], symbols[start : start + n])
    return count


@kernel
def _put_bytes(source: NDArray[Any], out: NDArray[Any]) -> None:
    for i in range(source.size):
        out[i] = np.uint8(source[i])


@kernel
def _put_nibbles(source: NDArray[Any], out: NDArray[Any]) -> None:
    for i in range(out.size):
        out[i] = np.uint8(source[2 * i] | source[2 * i + 1] << np.uint32(4))


@kernel
def _put_bits(source: NDArray[Any], shift: Any, width: int, out: NDArray[Any]) -> None:
    if width == 4:
        for i in range(out.size):
            out[i] = np.uint8((source[2 * i] >> shift) & np.uint32(15) | (source[2 * i + 1] >> shift) << np.uint32(4))
    else:
        for i in range(out.size):
            a, b = (source[4 * i] >> shift) & np.uint32(3), (source[4 * i + 1] >> shift) & np.uint32(3)
            c, d = (source[4 * i + 2] >> shift) & np.uint32(3), (source[4 * i + 3] >> shift) & np.uint32(3)
            out[i] = np.uint8(a | b << np.uint32(2) | c << np.uint32(4) | d << np.uint32(6))


@kernel
def _widen(
    whole: NDArray[Any], bits: NDArray[Any], symbols: NDArray[Any], exceptions: NDArray[Any], low: int, nibbles: bool,
    fold: bool, out: NDArray[Any],
) -> bool:  # fmt: skip
    rest = np.empty(_SPAN + 4, np.uint32)
    escape, used, width = np.uint32(15 if nibbles else 255), 0, low % 8
    mask = np.uint32(0xFFFF if out.itemsize == 2 else 0xFFFFFFFF)
    for start in range(0, out.size, _SPAN):
        target = out[start : start + _SPAN]
        n = target.size
        if nibbles:
            _take_nibbles(symbols[start // 2 : (start + n + 1) // 2], rest)
        else:
            _take_bytes(symbols[start : start + n], rest)
        largest = np.uint32(0)
        for i in range(n):
            largest = max(largest, rest[i])
        if largest == escape:
            for i in range(n):
                if rest[i] == escape:
                    if used == exceptions.size:
                        return False
                    rest[i] = exceptions[used]
                    used += 1
        if low:
            for i in range(n):
                rest[i] <<= np.uint32(low)
        if low >= 8:
            _add_bytes(whole[start : start + n], rest)
        if width:
            per = 8 // width
            _add_bits(bits[start // per : (start + n + per - 1) // per], np.uint32(low - width), width, rest)
        if fold:
            for i in range(n):
                target[i] = _unzigzag(rest[i] & mask)
        else:
            for i in range(n):
                target[i] = rest[i]
    return used == exceptions.size


@kernel
def _take_bytes(source: NDArray[Any], out: NDArray[Any]) -> None:
    for i in range(source.size):
        out[i] = source[i]


@kernel
def _add_bytes(source: NDArray[Any], out: NDArray[Any]) -> None:
    for i in range(source.size):
        out[i] |= source[i]


@kernel
def _take_nibbles(source: NDArray[Any], out: NDArray[Any]) -> None:
    for i in range(source.size):
        out[2 * i] = source[i] & np.uint8(15)
        out[2 * i + 1] = source[i] >> np.uint8(4)


@kernel
def _add_bits(source: NDArray[Any], shift: Any, width: int, out: NDArray[Any]) -> None:
    if width == 4:
        for i in range(source.size):
            out[2 * i] |= np.uint32(source[i] & np.uint8(15)) << shift
            out[2 * i + 1] |= np.uint32(source[i] >> np.uint8(4)) << shift
    else:
        for i in range(source.size):
            for k in range(4):
                out[4 * i + k] |= ((np.uint32(source[i]) >> np.uint32(2 * k)) & np.uint32(3)) << shift
