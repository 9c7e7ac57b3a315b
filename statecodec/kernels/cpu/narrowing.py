"""Narrowing for CPUs; the arithmetic is that of `reference.narrowing`.

A span of codes stays in the first-level cache while loops of one or two outputs go over it; more would not vectorise.
What becomes two bits or a nibble is a byte first, and four or two such bytes are put together as one number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statecodec.kernels.cpu.terms import centre_terms, uncentre_terms
from statecodec.kernels.cpu.views import Memory, array_of, kernel
from statecodec.kernels.reference.narrowing import Narrowing

_SPAN = 4096  # a multiple of what the bits and nibbles of a byte belong to
_BLOCK = 512  # symbols that are looked through at once for an exception
_UNSIGNED = {2: np.uint16, 4: np.uint32}


def narrow(codes: Memory, narrowing: Narrowing, parts: Mapping[str, Memory], exceptions: Memory) -> int:
    """See `reference.narrowing.narrow`."""
    source, centred = array_of(codes), narrowing.cols > 0
    if centred:
        columns, lines = (array_of(parts[name]).view(np.uint16) for name in ("columns", "lines"))
        folded = _centred(source.reshape(-1, narrowing.cols), columns, lines)
        if folded is None:
            return -1
        source = folded
    extra = array_of(exceptions).view(_UNSIGNED[source.itemsize])
    whole, bits, symbols = (array_of(parts[name]) for name in ("bytes", "bits", "symbols"))
    return int(_narrow(source, whole, bits, symbols, extra, narrowing.low, narrowing.nibbles, 0 if centred else 1))


def widen(parts: Mapping[str, Memory], exceptions: Memory, narrowing: Narrowing, codes: Memory) -> bool:
    """See `reference.narrowing.widen`."""
    target, centred = array_of(codes), narrowing.cols > 0
    extra = array_of(exceptions).view(_UNSIGNED[target.itemsize])
    whole, bits, symbols = (array_of(parts[name]) for name in ("bytes", "bits", "symbols"))
    if not _widen(whole, bits, symbols, extra, narrowing.low, narrowing.nibbles, 0 if centred else 1, target):
        return False
    if centred:
        columns, lines = (array_of(parts[name]).view(np.uint16) for name in ("columns", "lines"))
        uncentre_terms(target.reshape(-1, narrowing.cols), columns.reshape(-1, narrowing.cols), lines)
    return True


def _centred(matrix: NDArray[Any], columns: NDArray[Any], lines: NDArray[Any]) -> NDArray[Any] | None:
    """Folded residuals plus 1, flat; None if one does not fit."""
    folded = np.empty(matrix.shape, np.uint16)
    fits = centre_terms(matrix, columns.reshape(-1, matrix.shape[1]), lines, folded)
    return folded.reshape(-1) if fits else None


@kernel
def _narrow(
    source: NDArray[Any], whole: NDArray[Any], bits: NDArray[Any], symbols: NDArray[Any], exceptions: NDArray[Any],
    low: int, nibbles: bool, fold: int,
) -> int:  # fmt: skip
    few, rest = np.empty(_SPAN, np.uint8), np.empty(_SPAN, np.uint8)
    escape, count, width = 15 if nibbles else 255, 0, low % 8
    for start in range(0, source.size, _SPAN):
        piece = source[start : start + _SPAN]
        n = piece.size
        target = few[:n] if nibbles else symbols[start : start + n]
        if low == 0:
            largest = _put_symbols(piece, fold, low, escape, target)
        elif width == 0:
            largest = _put_both(piece, fold, low, escape, target, 0, 255, whole[start : start + n])
        else:
            largest = _put_both(piece, fold, low, escape, target, low - width, (1 << width) - 1, rest)
            rest[n:] = 0
            _put_bits(rest, width, bits[start * width // 8 : ((start + n) * width + 7) // 8])
            if low > 8:
                _put_bytes(piece, fold, whole[start : start + n])
        if largest == escape:
            at = _next(target, 0, escape)
            while at < n:
                if count == exceptions.size:
                    return -1
                exceptions[count] = _folded(piece[at], fold) >> np.uint32(low)
                count += 1
                at = _next(target, at + 1, escape)
        if nibbles:
            few[n:] = 0
            _put_bits(few, 4, symbols[start // 2 : (start + n + 1) // 2])
    return count


@kernel
def _folded(x: Any, fold: int) -> Any:
    """zigzag(x) where `fold` is 1; where it is 0, x as it is, which has been folded before."""
    return np.uint32((np.int32(x) << np.int32(fold)) ^ (np.int32(x) >> np.int32(31)))


@kernel
def _unfolded(x: Any, fold: int) -> Any:
    return np.int32(x >> np.uint32(fold)) ^ -np.int32(x & np.uint32(fold))


@kernel
def _put_symbols(source: NDArray[Any], fold: int, low: int, escape: int, out: NDArray[Any]) -> Any:
    """Returns the largest symbol."""
    largest = np.uint32(0)
    for i in range(source.size):
        symbol = min(_folded(source[i], fold) >> np.uint32(low), np.uint32(escape))
        largest = max(largest, symbol)
        out[i] = np.uint8(symbol)
    return largest


@kernel
def _put_both(
    source: NDArray[Any], fold: int, low: int, escape: int, out: NDArray[Any], shift: int, mask: int,
    rest: NDArray[Any],
) -> Any:  # fmt: skip
    """Symbols, and some of the bits below them, a byte each. Returns the largest symbol."""
    largest = np.uint32(0)
    for i in range(source.size):
        folded = _folded(source[i], fold)
        symbol = min(folded >> np.uint32(low), np.uint32(escape))
        largest = max(largest, symbol)
        out[i] = np.uint8(symbol)
        rest[i] = np.uint8((folded >> np.uint32(shift)) & np.uint32(mask))
    return largest


@kernel
def _put_bytes(source: NDArray[Any], fold: int, out: NDArray[Any]) -> None:
    for i in range(source.size):
        out[i] = np.uint8(_folded(source[i], fold))


@kernel
def _put_bits(source: NDArray[Any], width: int, out: NDArray[Any]) -> None:
    """Numbers of four bits or two, a byte each, next to each other."""
    if width == 4:
        pairs = source.view(np.uint16)
        for i in range(out.size):
            out[i] = np.uint8(pairs[i] | pairs[i] >> np.uint16(4))
    else:
        fours = source.view(np.uint32)
        for i in range(out.size):
            x = fours[i]
            out[i] = np.uint8(x | x >> np.uint32(6) | x >> np.uint32(12) | x >> np.uint32(18))


@kernel
def _next(symbols: NDArray[Any], start: int, escape: int) -> int:
    """Where the next exception is from `start` on; the number of symbols if there is none."""
    for at in range(start, symbols.size, _BLOCK):
        block = symbols[at : at + _BLOCK]
        if _largest(block) == escape:
            i = 0
            while block[i] != escape:
                i += 1
            return at + i
    return symbols.size


@kernel
def _largest(symbols: NDArray[Any]) -> Any:
    largest = np.uint8(0)
    for i in range(symbols.size):
        largest = max(largest, symbols[i])
    return largest


@kernel
def _widen(
    whole: NDArray[Any], bits: NDArray[Any], symbols: NDArray[Any], exceptions: NDArray[Any], low: int, nibbles: bool,
    fold: int, out: NDArray[Any],
) -> bool:  # fmt: skip
    few, rest, nothing = np.empty(_SPAN, np.uint8), np.zeros(_SPAN, np.uint8), np.zeros(_SPAN, np.uint8)
    escape, used, width = 15 if nibbles else 255, 0, low % 8
    mask = np.uint32(0xFFFF if out.itemsize == 2 else 0xFFFFFFFF)
    for start in range(0, out.size, _SPAN):
        target = out[start : start + _SPAN]
        n = target.size
        if nibbles:
            _take_bits(symbols[start // 2 : (start + n + 1) // 2], 4, few)
        if width:
            _take_bits(bits[start * width // 8 : ((start + n) * width + 7) // 8], width, rest)
        piece = few[:n] if nibbles else symbols[start : start + n]
        bytes_ = whole[start : start + n] if low >= 8 else nothing[:n]
        if low:
            _put_together(piece, bytes_, rest, low, mask, fold, target)
        else:
            _unfold(piece, fold, target)
        at = _next(piece, 0, escape)
        while at < n:
            if used == exceptions.size:
                return False
            target[at] = _together(exceptions[used], bytes_[at], rest[at], low, mask, fold)
            used += 1
            at = _next(piece, at + 1, escape)
    return used == exceptions.size


@kernel
def _take_bits(source: NDArray[Any], width: int, out: NDArray[Any]) -> None:
    """The inverse of `_put_bits`."""
    if width == 4:
        pairs = out.view(np.uint16)
        for i in range(source.size):
            two = np.uint16(source[i])
            pairs[i] = (two | two << np.uint16(4)) & np.uint16(0x0F0F)
    else:
        fours = out.view(np.uint32)
        for i in range(source.size):
            four = np.uint32(source[i])
            spread = four | four << np.uint32(6) | four << np.uint32(12) | four << np.uint32(18)
            fours[i] = spread & np.uint32(0x03030303)


@kernel
def _together(symbol: Any, whole: Any, few: Any, low: int, mask: Any, fold: int) -> Any:
    folded = np.uint32(symbol) << np.uint32(low) | np.uint32(whole) | np.uint32(few) << np.uint32(low - low % 8)
    return _unfolded(folded & mask, fold)


@kernel
def _put_together(
    symbols: NDArray[Any], whole: NDArray[Any], few: NDArray[Any], low: int, mask: Any, fold: int, out: NDArray[Any]
) -> None:
    for i in range(out.size):
        out[i] = _together(symbols[i], whole[i], few[i], low, mask, fold)


@kernel
def _unfold(symbols: NDArray[Any], fold: int, out: NDArray[Any]) -> None:
    for i in range(out.size):
        out[i] = _unfolded(np.uint32(symbols[i]), fold)
