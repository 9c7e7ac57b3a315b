"""Parts of integer codes as what is left after a low-rank prediction, and the factors of that prediction.

    payload = rank u8, shift u8, columns u32, then a record of two parts: the factors, left and right, what is left

`statecodec.kernels.factors` says what is predicted, and how the factors are found.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from statecodec.buffers import Bytes, Pool
from statecodec.codecs import rows_cols
from statecodec.errors import FormatError
from statecodec.format.narrowed import Form
from statecodec.format.planes import cpu_kernels
from statecodec.format.words import Words, flat
from statecodec.kernels.factors import MOST_RANK, MOST_SHIFT, RANK, SMALLEST, Factors

Matrix: TypeAlias = "NDArray[Any]"  # of codes: int16 or int32
Unpack: TypeAlias = "Callable[[Bytes, Sequence[Words]], None]"  # record, memory for its parts

HEADER = struct.Struct("<BBI")
_WORD, _GOLDEN = np.uint64(1 << 32), np.uint64(0x9E3779B9)
MOST_LOW = 8  # low bits of codes that are worth predicting: of wider ones, weights on a fine grid, too little is saved


def slack(part: Words) -> int:
    """How many bytes the factors of a part can take, with their own slack, header and rows."""
    rows, cols = rows_cols(part.shape)
    return HEADER.size + 3 * 2 * RANK * (rows + cols) + 256 if min(rows, cols) >= SMALLEST else 0


@contextmanager
def split(matrix: Matrix, form: Form, pool: Pool) -> Iterator[tuple[bytes, list[Words]] | None]:
    """The header and the parts of codes whose own form is `form`; None where a prediction would save too little.

    What is left is in pooled memory.
    """
    factors = cpu_kernels().factors_of(matrix) if form.narrowing.low <= MOST_LOW else None
    if factors is None:
        yield None
        return
    buffer = pool.take(matrix.nbytes)
    rest = buffer[: matrix.nbytes].view(matrix.dtype).reshape(matrix.shape)
    np.copyto(rest, matrix)
    cpu_kernels().add_prediction(rest, factors, sign=-1)
    numbers = np.concatenate((factors.left, factors.right), axis=None)
    saved = _bits(_sample(matrix)) - _bits(_sample(rest))  # by each code
    if saved * matrix.size > _bits(numbers.reshape(1, -1)) * numbers.size:
        left = Words(rest.reshape(-1), matrix.shape)
        yield HEADER.pack(len(factors.left), factors.shift, matrix.shape[1]), [flat(numbers), left]
    else:
        yield None
    pool.give(buffer)


def _sample(matrix: Matrix) -> Matrix:
    """64 rows and 128 columns, spread evenly and at no stride."""
    places = (
        (np.arange(min(length, most), dtype=np.uint64) * _GOLDEN % _WORD * length) // _WORD
        for length, most in zip(matrix.shape, (64, 128), strict=True)
    )
    return matrix[np.ix_(*(p.astype(np.int64) for p in places))]


def _bits(codes: Matrix) -> float:
    """About how many bits each of these codes takes."""
    form: Form | None = cpu_kernels().form_of(codes)
    if form is None:
        return 8.0 * codes.itemsize
    # Of codes without a sign, as folded changes since a base are, one of the low bits is always the same, and packs.
    unsigned = form.narrowing.low > 0 and not form.narrowing.cols and int(codes.min()) >= 0
    return form.bits - 1.0 if unsigned else form.bits


def join(payload: Bytes, out: Words, unpack: Unpack) -> None:
    """Restore codes into `out`; `unpack` fills the parts of the record within the payload. Raises FormatError."""
    codes = out.array
    n = codes.size
    if payload.size < HEADER.size:
        raise FormatError(f"predicted codes in {payload.size} bytes: their header alone takes {HEADER.size}")
    rank, shift, cols = HEADER.unpack(payload[: HEADER.size].data)
    whole = cols > 0 and n % cols == 0
    if not whole or not 0 < rank <= MOST_RANK or shift > MOST_SHIFT or rank * (n // cols + cols) > n:
        raise FormatError(f"predicted codes: rank {rank}, shift {shift}, {cols} columns of {n} codes")
    numbers = np.empty(rank * (n // cols + cols), np.int16)
    unpack(payload[HEADER.size :], [flat(numbers), Words(codes, (n // cols, cols))])
    left, right = np.split(numbers, [rank * (n // cols)])
    factors = Factors(left.reshape(rank, -1), right.reshape(rank, -1), shift)
    if not factors.in_range:
        raise FormatError("predicted codes: their factors can give a prediction that is out of range")
    cpu_kernels().add_prediction(codes.reshape(-1, cols), factors, sign=1)
