"""Which form a part of integer codes is narrowed to: judged on a sample, by what a Huffman code takes for its symbols.

Nibbles take half as many symbols as bytes, so half the time in the entropy coder, forwards and backwards. With the low
bits that they need beside them they are as small wherever a code's last bits are noise, which on a fine grid they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from statecodec.codecs import rows_cols
from statecodec.format.narrowed import LOW_BITS, Form
from statecodec.format.planes import cpu_kernels

SAMPLE_ROWS, SAMPLE_CODES = 64, 1 << 13
CENTRE_FROM = 16  # rows and columns that the terms of a matrix need to pay
CENTRE_WORTH = 0.3  # bits that the terms must save
RARE, OFTEN = 1000, 50  # one exception in so many codes, at most
EXCEPTION = 12  # bits of one
FEW, MATCHES = 3.2, 1.08  # bytes of so few bits match by chance, which costs size and three times the time
FASTER = 0.997  # of the size of bytes, or less: nibbles


def form_of(part: Tensor) -> Form | None:
    """The form for a part of codes (int16 or int32, contiguous); None if they are not small enough for any."""
    some = _sample(part)
    forms = list(_candidates(some))
    if not forms:
        return None
    form = forms[0] if len(forms) == 1 else _cheapest(some.view(-1), forms)
    return replace(form, cols=rows_cols(tuple(part.shape))[1]) if form.cols else form


def _sample(part: Tensor) -> Tensor:
    """Some codes from the middle of a part, rows of a matrix."""
    rows, cols = rows_cols(tuple(part.shape))
    height = min(rows, SAMPLE_ROWS)
    width = min(cols, SAMPLE_CODES // height)
    top, left = (rows - height) // 2, (cols - width) // 2
    return part.view(rows, cols)[top : top + height, left : left + width].contiguous()


def _candidates(some: Tensor) -> Iterator[Form]:
    """The forms worth trying on a sample: with as few low bits as leave few exceptions, and next to none."""
    rows, cols = some.shape
    flat = some.view(-1)
    lengths, terms = cpu_kernels().bit_lengths(flat, 0).numpy(), 0
    if some.element_size() == 2 and min(rows, cols) >= CENTRE_FROM:
        centred, bits = cpu_kernels().bit_lengths(flat, cols).numpy(), np.arange(len(lengths))
        if centred @ bits + CENTRE_WORTH * flat.numel() < lengths @ bits:
            lengths, terms = centred, cols
    n = flat.numel()
    longer = (n - lengths.cumsum()).tolist()  # codes of more than so many bits
    for nibbles in (False, True):
        lows = {_fewest(longer, 4 if nibbles else 8, n // share) for share in (OFTEN, RARE)}
        yield from (Form(terms, low, nibbles) for low in LOW_BITS if low in lows)


def _fewest(longer: Sequence[int], bits: int, most: int) -> int | None:
    """The fewest low bits that leave no more than so many codes that do not fit so many bits beside them."""
    return next((low for low in LOW_BITS if longer[low + bits] <= most), None)


def _cheapest(flat: Tensor, forms: Sequence[Form]) -> Form:
    costs = [_bits(flat, form) * (FASTER if form.nibbles else 1.0) for form in forms]
    return forms[costs.index(min(costs))]


def _bits(flat: Tensor, form: Form) -> float:
    """About how many bits a sample takes in this form, but for the terms."""
    counts = cpu_kernels().symbol_counts(flat, form).to(torch.float64)
    n, exceptions = flat.numel(), float(counts[-1])
    if form.nibbles:
        each = counts / n  # of so few the sample knows enough
        bits = n / 2 * cpu_kernels().huffman_bits(torch.outer(each, each).view(-1))
    else:
        # A code fitted to a sample is too short for it (Miller and Madow).
        bits = cpu_kernels().huffman_bits(counts) + int((counts > 0).sum()) / (2 * math.log(2))
        bits *= MATCHES if bits < FEW * n else 1.0
    return float(form.low * n + bits + EXCEPTION * exceptions)
