"""Parts of integer codes as what is left after a low-rank prediction, and the factors of that prediction.

    payload = rank u8, shift u8, columns u32, then a record of two parts: the factors, left and right, what is left

`statecodec.kernels.factors` says what is predicted, and how the factors are found.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from statecodec.buffers import Bytes, Pool
from statecodec.codecs import rows_cols
from statecodec.errors import FormatError
from statecodec.format.narrowed import Form
from statecodec.format.planes import cpu_kernels
from statecodec.kernels.factors import MOST_RANK, MOST_SHIFT, RANK, SMALLEST, Factors
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Unpack: TypeAlias = "Callable[[Bytes, Sequence[Tensor]], None]"  # record, memory for its parts

HEADER = struct.Struct("<BBI")
_WORD, _GOLDEN = np.uint64(1 << 32), np.uint64(0x9E3779B9)
MOST_LOW = 8  # low bits of codes that are worth predicting: of wider ones, weights on a fine grid, too little is saved


def slack(part: Tensor) -> int:
    """How many bytes the factors of a part can take, with their own slack, header and rows."""
    rows, cols = rows_cols(tuple(part.shape))
    return HEADER.size + 3 * 2 * RANK * (rows + cols) + 256 if min(rows, cols) >= SMALLEST else 0


@contextmanager
def split(matrix: Tensor, form: Form, pool: Pool) -> Iterator[tuple[bytes, list[Tensor]] | None]:
    """The header and the parts of codes whose own form is `form`; None where a prediction would save too little.

    What is left is in pooled memory.
    """
    factors = cpu_kernels().factors_of(matrix) if form.narrowing.low <= MOST_LOW else None
    if factors is None:
        yield None
        return
    buffer = pool.take(matrix.nbytes)
    rest = torch.from_numpy(buffer[: matrix.nbytes]).view(matrix.dtype).view(matrix.shape)
    np.copyto(rest.numpy(), matrix.numpy())  # one thread
    cpu_kernels().add_prediction(rest, factors, sign=-1)
    numbers = torch.from_numpy(np.concatenate((factors.left, factors.right), axis=None))
    saved = _bits(_sample(matrix)) - _bits(_sample(rest))  # by each code
    if saved * matrix.numel() > _bits(numbers.view(1, -1)) * numbers.numel():
        yield HEADER.pack(len(factors.left), factors.shift, matrix.shape[1]), [numbers, rest]
    else:
        yield None
    pool.give(buffer)


def _sample(matrix: Tensor) -> Tensor:
    """64 rows and 128 columns, spread evenly and at no stride."""
    places = (
        (np.arange(min(length, most), dtype=np.uint64) * _GOLDEN % _WORD * length) // _WORD
        for length, most in zip(matrix.shape, (64, 128), strict=True)
    )
    return torch.from_numpy(matrix.numpy()[np.ix_(*(p.astype(np.int64) for p in places))])


def _bits(codes: Tensor) -> float:
    """About how many bits each of these codes takes."""
    form: Form | None = cpu_kernels().form_of(codes)
    if form is None:
        return 8.0 * codes.element_size()
    # Of codes without a sign, as folded changes since a base are, one of the low bits is always the same, and packs.
    unsigned = form.narrowing.low > 0 and not form.narrowing.cols and int(codes.numpy().min()) >= 0
    return form.bits - 1.0 if unsigned else form.bits


def join(payload: Bytes, out: Tensor, unpack: Unpack) -> None:
    """Restore codes into `out`; `unpack` fills the parts of the record within the payload. Raises FormatError."""
    n = out.numel()
    if payload.size < HEADER.size:
        raise FormatError(f"predicted codes in {payload.size} bytes: their header alone takes {HEADER.size}")
    rank, shift, cols = HEADER.unpack(payload[: HEADER.size].data)
    whole = cols > 0 and n % cols == 0
    if not whole or not 0 < rank <= MOST_RANK or shift > MOST_SHIFT or rank * (n // cols + cols) > n:
        raise FormatError(f"predicted codes: rank {rank}, shift {shift}, {cols} columns of {n} codes")
    numbers = torch.empty(rank * (n // cols + cols), dtype=torch.int16, device="cpu")
    matrix = out.view(-1, cols)
    unpack(payload[HEADER.size :], [numbers, matrix])
    left, right = np.split(numbers.numpy(), [rank * (n // cols)])
    factors = Factors(left.reshape(rank, -1), right.reshape(rank, -1), shift)
    if not factors.in_range:
        raise FormatError("predicted codes: their factors can give a prediction that is out of range")
    cpu_kernels().add_prediction(matrix, factors, sign=1)
