"""Narrowing integer codes: a few raw low bits, one byte or nibble a code for the entropy coder, a list of exceptions.

Codes on a grid are small integers with a sign, around 0 or (log codes of second moments) around a row term plus a
column term. What is left after those terms is folded to unsigned numbers (0, -1, 1, -2 ... become 0, 1, 2, 3), whose
low bits are noise and whose rest fits a byte but for a few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ROWS = 64  # rows that share their column terms
LOW_BITS = (0, 2, 4, 8, 10, 12)
MOST_EXCEPTIONS = 8  # at most one code in so many


@dataclass(frozen=True)
class Narrowing:
    """How codes are narrowed. `cols`: columns of the matrix whose terms are taken out, 0 for none (int16 only)."""

    cols: int = 0
    low: int = 0
    nibbles: bool = False

    @property
    def escape(self) -> int:
        """The symbol of an exception."""
        return 15 if self.nibbles else 255

    def sizes(self, n: int) -> dict[str, tuple[int, int]]:
        """The parts of n narrowed codes but the exceptions, in order: bytes of an element, 1 or 2, and elements."""
        rows = n // self.cols if self.cols else 0
        return {
            "columns": (2, -(-rows // BLOCK_ROWS) * self.cols),
            "lines": (2, rows),
            "bytes": (1, n if self.low >= 8 else 0),
            "bits": (1, -(-n * (self.low % 8) // 8)),
            "symbols": (1, -(-n // 2) if self.nibbles else n),
        }


class Form(NamedTuple):
    """How codes are narrowed, and about how many bits each of them then takes, the terms not counted."""

    narrowing: Narrowing
    bits: float


def narrow(codes: Tensor, narrowing: Narrowing, parts: Mapping[str, Tensor], exceptions: Tensor) -> int:
    """Narrow integer codes into parts and a list of exceptions.

    Args:
        codes: int16 or int32, flat.
        narrowing: How.
        parts: Written: tensors of `narrowing.sizes`.
        exceptions: Written: the codes' dtype; codes that do not fit beside the low bits, in order.

    Returns:
        The number of exceptions; -1 if they are too many for `exceptions`, or the codes cannot be narrowed this way.
    """
    bits = 8 * codes.element_size()
    wide = codes.to(torch.int64)
    if narrowing.cols:
        residuals = centred(wide.view(-1, narrowing.cols), parts)
        if residuals is None:
            return -1
        folded = residuals.view(-1)
    else:
        folded = zigzag(wide, bits)
    _put_low(folded, narrowing.low, parts)
    rest = folded >> narrowing.low
    beyond = rest >= narrowing.escape
    count = int(beyond.sum())
    if count > len(exceptions):
        return -1
    exceptions[:count] = _wrapped(rest[beyond], bits).to(codes.dtype)
    symbols = torch.where(beyond, narrowing.escape, rest)
    if narrowing.nibbles:
        symbols = torch.nn.functional.pad(symbols, (0, len(symbols) % 2))
        symbols = symbols[0::2] | (symbols[1::2] << 4)
    parts["symbols"].copy_(symbols.to(torch.uint8))
    return count


def widen(parts: Mapping[str, Tensor], exceptions: Tensor, narrowing: Narrowing, codes: Tensor) -> bool:
    """The inverse of `narrow`.

    Args:
        parts: As written.
        exceptions: As written, only those that there are.
        narrowing: As for `narrow`.
        codes: Written: int16 or int32, flat.

    Returns:
        False if there are not as many exceptions as the symbols say.
    """
    n, bits = len(codes), 8 * codes.element_size()
    symbols = parts["symbols"].to(torch.int64)
    if narrowing.nibbles:
        symbols = torch.stack((symbols & 15, symbols >> 4), -1).view(-1)[:n]
    beyond = symbols == narrowing.escape
    if int(beyond.sum()) != len(exceptions):
        return False
    rest = symbols.clone()
    rest[beyond] = exceptions.to(torch.int64) & ((1 << bits) - 1)
    folded = ((rest << narrowing.low) | _low(parts, narrowing.low, n)) & ((1 << bits) - 1)
    if narrowing.cols:
        rows = n // narrowing.cols
        columns = _unzigzag(parts["columns"].to(torch.int64) & 0xFFFF).view(-1, narrowing.cols).cumsum(0)
        lines = _unzigzag(parts["lines"].to(torch.int64) & 0xFFFF).cumsum(0)
        terms = columns.repeat_interleave(BLOCK_ROWS, 0)[:rows] + lines[:, None]
        values = torch.where(folded == 0, 0, _unzigzag(folded - 1) + terms.view(-1))
    else:
        values = _unzigzag(folded)
    codes.copy_(_wrapped(values, bits).to(codes.dtype))
    return True


def centred(codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor | None:
    """Folded residuals plus 1; 0 for codes of 0, which do not count in the means. None if one does not fit."""
    rows, cols = codes.shape
    columns, lines = codes.new_zeros(-(-rows // BLOCK_ROWS), cols), codes.new_zeros(rows)
    before = codes.new_zeros(cols)
    for block in range(len(columns)):
        block_codes = codes[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
        there = block_codes != 0
        count = there.sum(0)
        mean = _rounded(block_codes.sum(0), count)
        level = _rounded(torch.where(count > 0, mean, 0).sum(), (count > 0).sum())
        before = columns[block] = torch.where(count > 0, mean - level, before)
        inside = torch.where(there, block_codes - before, 0)
        lines[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS] = _rounded(inside.sum(1), there.sum(1))
    terms = columns.repeat_interleave(BLOCK_ROWS, 0)[:rows] + lines[:, None]
    folded = torch.where(codes == 0, 0, zigzag(codes - terms, 16) + 1)
    zero = codes.new_zeros(1, cols)
    parts["columns"].copy_(_wrapped(zigzag(columns.diff(dim=0, prepend=zero), 16), 16).view(-1).to(torch.int16))
    parts["lines"].copy_(_wrapped(zigzag(lines.diff(prepend=zero[0, :1]), 16), 16).to(torch.int16))
    return None if bool((folded > 0xFFFF).any()) else folded


def _rounded(total: Tensor, count: Tensor) -> Tensor:
    """total / count rounded half up; 0 of nothing."""
    return torch.div(2 * total + count, (2 * count).clamp(min=1), rounding_mode="floor")


def zigzag(x: Tensor, bits: int) -> Tensor:
    """Two's complement numbers of so many bits (modulo 2**bits) as unsigned ones, small for small magnitudes."""
    signed = _wrapped(x, bits)
    return torch.where(signed < 0, -2 * signed - 1, 2 * signed)


def _unzigzag(x: Tensor) -> Tensor:
    return torch.where(x & 1 == 1, -(x >> 1) - 1, x >> 1)


def _wrapped(x: Tensor, bits: int) -> Tensor:
    """Modulo 2**bits, as a signed number."""
    half = 1 << (bits - 1)
    return ((x + half) & ((1 << bits) - 1)) - half


def _put_low(folded: Tensor, low: int, parts: Mapping[str, Tensor]) -> None:
    if low >= 8:
        parts["bytes"].copy_((folded & 255).to(torch.uint8))
    width = low % 8
    if width:
        per = 8 // width
        few = (folded >> (low - width)) & ((1 << width) - 1)
        few = torch.nn.functional.pad(few, (0, -len(few) % per)).view(-1, per)
        parts["bits"].copy_((few << (width * torch.arange(per, device=few.device))).sum(1).to(torch.uint8))


def _low(parts: Mapping[str, Tensor], low: int, n: int) -> Tensor:
    low_bits = parts["symbols"].new_zeros(n, dtype=torch.int64)
    if low >= 8:
        low_bits |= parts["bytes"].to(torch.int64)
    width = low % 8
    if width:
        few = parts["bits"].to(torch.int64)[:, None] >> (width * torch.arange(8 // width, device=low_bits.device))
        low_bits |= (few & ((1 << width) - 1)).view(-1)[:n] << (low - width)
    return low_bits
