"""Row and column terms of log codes for CPUs; the arithmetic is that of `reference.narrowing.centred`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from statecodec.kernels.cpu.views import kernel
from statecodec.kernels.reference.narrowing import BLOCK_ROWS

_SPAN = 4096


@kernel
def zigzag(x: Any) -> Any:
    """Two's complement numbers as unsigned ones, small for small magnitudes: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return np.uint32((x << np.int32(1)) ^ (x >> np.int32(31)))


@kernel
def unzigzag(x: Any) -> Any:
    return np.int32(x >> np.uint32(1)) ^ -np.int32(x & np.uint32(1))


@kernel
def _rounded(total: Any, count: Any) -> Any:
    """total / count rounded half up; 0 of nothing."""
    return (2 * total + count) // (2 * count) if count else np.int64(0)


@kernel
def centre_terms(codes: NDArray[Any], columns: NDArray[Any], lines: NDArray[Any], folded: NDArray[Any]) -> bool:
    """Subtract row and column terms from `codes`, into `folded`. False if a residual plus 1 does not fit."""
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
def uncentre_terms(codes: NDArray[Any], columns: NDArray[Any], lines: NDArray[Any]) -> None:
    """In place: folded residuals to codes."""
    rows, cols = codes.shape
    terms, line = np.zeros(cols, np.int32), np.int32(0)
    for row in range(rows):
        if row % BLOCK_ROWS == 0:
            changes = columns[row // BLOCK_ROWS]
            for j in range(cols):
                terms[j] += unzigzag(np.uint32(changes[j]))
        line += unzigzag(np.uint32(lines[row]))
        line_codes = codes[row]
        for j in range(cols):
            folded = np.uint32(np.uint16(line_codes[j]))
            value = unzigzag(folded - np.uint32(1)) + terms[j] + line
            line_codes[j] = np.int16(np.int32(0) if folded == 0 else value)
