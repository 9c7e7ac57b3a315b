"""Chooses the form that integer codes are narrowed to, on a sample, by the entropy of its symbols.

Nibbles take half as many symbols as bytes, so half the time in the entropy coder, forwards and backwards. With the low
bits that they need beside them they are as small wherever a code's last bits are noise, as on a fine grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from statecodec.kernels.reference.narrowing import LOW_BITS, Form, Narrowing, centred, zigzag
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_ROWS, SAMPLE_CODES = 64, 1 << 13
CENTRE_FROM = 16  # rows and columns that the terms of a matrix need to pay
CENTRE_WORTH = 0.3  # bits that the terms must save
RARE, OFTEN = 1000, 50  # one exception in so many codes, at most
EXCEPTION = 12.0  # bits of one
FEW, MATCHES = 3.2, 1.08  # bytes of so few bits match by chance, which costs size and three times the time
FASTER = 0.997  # of the size of bytes, or less: nibbles


def form_of(codes: Tensor) -> Form | None:
    """Choose the form that integer codes are narrowed to.

    Args:
        codes: int16 or int32, rows x cols, contiguous.

    Returns:
        The form; None if the codes are not small enough for any.
    """
    top, left, height, width = sample(*codes.shape)
    sampled = codes[top : top + height, left : left + width]
    folded = zigzag(sampled.to(torch.int64), 8 * codes.element_size()).reshape(-1)
    cols = 0
    if sampled.element_size() == 2 and min(sampled.shape) >= CENTRE_FROM:
        rest = _residuals(sampled)
        if _mean_length(rest) + CENTRE_WORTH < _mean_length(folded):
            folded, cols = rest, codes.shape[1]
    candidates = list(_candidates(folded))
    if not candidates:
        return None
    costs = [_bits(folded, narrowing) * (FASTER if narrowing.nibbles else 1.0) for narrowing in candidates]
    return Form(replace(candidates[costs.index(min(costs))], cols=cols), min(costs) / len(folded))


def sample(rows: int, cols: int) -> tuple[int, int, int, int]:
    """The rectangle in the middle of a matrix that stands for all of it: top, left, height, width."""
    height = min(rows, SAMPLE_ROWS)
    width = min(cols, SAMPLE_CODES // max(height, 1))
    return (rows - height) // 2, (cols - width) // 2, height, width


def _residuals(sampled: Tensor) -> Tensor:
    """Folded residuals plus 1 of a matrix, all of them 0xFFFF where one does not fit."""
    sizes = Narrowing(sampled.shape[1]).sizes(sampled.numel()).items()
    parts = {name: sampled.new_empty(n, dtype=torch.int16 if size == 2 else torch.uint8) for name, (size, n) in sizes}
    residuals = centred(sampled.to(torch.int64), parts)
    if residuals is None:
        residuals = torch.full(sampled.shape, 0xFFFF, dtype=torch.int64, device=sampled.device)
    return residuals.reshape(-1)


def _lengths(folded: Tensor) -> Tensor:
    """How many take 0, 1 ... 32 bits."""
    return torch.bincount(torch.frexp(folded.to(torch.float64)).exponent.to(torch.int64), minlength=33)


def _mean_length(folded: Tensor) -> float:
    return float(
        _lengths(folded).to(torch.float64) @ torch.arange(33, dtype=torch.float64, device=folded.device)
    ) / len(folded)


def _candidates(folded: Tensor) -> Iterator[Narrowing]:
    """The forms worth trying: with as few low bits as leave few exceptions, and next to none."""
    n = len(folded)
    longer = (n - _lengths(folded).cumsum(0)).tolist()  # codes of more than so many bits
    for nibbles in (False, True):
        lows = {_fewest(longer, 4 if nibbles else 8, n // share) for share in (OFTEN, RARE)}
        yield from (Narrowing(low=low, nibbles=nibbles) for low in LOW_BITS if low in lows)


def _fewest(longer: Sequence[int], bits: int, most: int) -> int | None:
    """The fewest low bits that leave no more than so many codes that do not fit so many bits beside them."""
    return next((low for low in LOW_BITS if longer[low + bits] <= most), None)


def _bits(folded: Tensor, narrowing: Narrowing) -> float:
    """About how many bits the codes take in this form, but for the terms."""
    n, symbols = len(folded), (folded >> narrowing.low).clamp(max=narrowing.escape)
    counts = torch.bincount(symbols, minlength=narrowing.escape + 1).to(torch.float64)
    bits = float(n * math.log2(n) - counts @ counts.clamp(min=1).log2())
    if not narrowing.nibbles:
        # The entropy of a sample is too small (Miller and Madow).
        bits += int((counts > 0).sum()) / (2 * math.log(2))
        bits *= MATCHES if bits < FEW * n else 1.0
    return narrowing.low * n + bits + EXCEPTION * float(counts[-1])
