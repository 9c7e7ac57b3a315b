"""Parts of integer codes in their narrowed form: the header in front of the record, writing and reading.

    payload = flags u8 (1: nibbles), low u8, columns u32, exceptions u32, then a record of the narrowed parts

`statecodec.kernels.reference.narrowing` says what the parts are, `forms` beside it which form is taken. Columns are 0
where no terms were taken out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from statecodec.buffers import Bytes, Pool
from statecodec.errors import FormatError
from statecodec.format.planes import cpu_kernels
from statecodec.format.words import Words, flat
from statecodec.kernels.reference.narrowing import LOW_BITS, MOST_EXCEPTIONS, Form, Narrowing

__all__ = ["LOW_BITS", "Form", "Narrowing", "join", "split"]

Array: TypeAlias = "NDArray[Any]"
Unpack: TypeAlias = "Callable[[Bytes, Sequence[Words]], list[Array]]"  # record, memory for its parts -> its parts

HEADER = struct.Struct("<BBII")
_DTYPES: dict[int, Any] = {1: np.uint8, 2: np.uint16}  # of parts, by the bytes of an element


def slack(part: Words) -> int:
    """How many bytes more than the part its narrowed form can take, with header and rows."""
    codes = part.array
    if not part.planes.codes:
        return 0
    # Of each code, low bits of a byte and a half, a symbol, and for one in eight all of it; of 16 bits, two of terms.
    return (3 * codes.size if codes.itemsize == 2 else 0) + 128


def planes(itemsize: int) -> int:
    """Of how many planes codes of that size consist once they are narrowed."""
    return sum(size for size, _ in Narrowing().sizes(0).values()) + itemsize


@contextmanager
def split(codes: Array, narrowing: Narrowing, pool: Pool, room: Bytes) -> Iterator[tuple[bytes, list[Words]] | None]:
    """The header and the narrowed parts of flat codes, in pooled memory; None if the form does not fit.

    Low bytes and bits, which are noise and stored as they are, are in `room` if nothing is stored before them.
    """
    buffer, parts = _take(narrowing, codes.size, pool)
    if not narrowing.cols:
        position = 0
        for name in ("bytes", "bits"):
            n = parts[name].size
            parts[name] = room[position : position + n]
            position += n
    few = pool.take(codes.nbytes // MOST_EXCEPTIONS)
    exceptions = few[: codes.size // MOST_EXCEPTIONS * codes.itemsize].view(codes.dtype)
    count = cpu_kernels().narrow(codes, narrowing, parts, exceptions)
    if count < 0:
        yield None
    else:
        header = HEADER.pack(narrowing.nibbles, narrowing.low, narrowing.cols, count)
        yield header, [*map(flat, parts.values()), flat(exceptions[:count])]
    pool.give(few)
    pool.give(buffer)


def join(payload: Bytes, out: Array, pool: Pool, unpack: Unpack) -> None:
    """Widen a payload into flat codes; `unpack` gives the parts of the record within it, in this memory or other.

    Raises FormatError.
    """
    narrowing, count = _header(payload, out)
    buffer, parts = _take(narrowing, out.size, pool)
    room = np.empty(count, out.dtype)
    *unpacked, exceptions = unpack(payload[HEADER.size :], [*map(flat, parts.values()), flat(room)])
    if not cpu_kernels().widen(dict(zip(parts, unpacked, strict=True)), exceptions, narrowing, out):
        raise FormatError(f"narrowed codes: {count} exceptions are listed, the symbols say otherwise")
    pool.give(buffer)


def _header(payload: Bytes, codes: Array) -> tuple[Narrowing, int]:
    n = codes.size
    if payload.size < HEADER.size:
        raise FormatError(f"narrowed codes in {payload.size} bytes: their header alone takes {HEADER.size}")
    flags, low, cols, count = HEADER.unpack(payload[: HEADER.size].data)
    centred = cols == 0 or (codes.itemsize == 2 and n % cols == 0)
    if flags > 1 or low not in LOW_BITS or not centred or count > n // MOST_EXCEPTIONS:
        raise FormatError(
            f"narrowed codes: flags {flags}, {low} low bits, {cols} columns, {count} exceptions of {n} {codes.dtype}"
        )
    return Narrowing(cols, low, flags == 1), count


def _take(narrowing: Narrowing, n: int, pool: Pool) -> tuple[Bytes, dict[str, Array]]:
    """Pooled memory for the narrowed parts of n codes."""
    sizes = narrowing.sizes(n)
    buffer = pool.take(sum(size * length + 8 for size, length in sizes.values()))
    parts, position = {}, 0
    for name, (size, length) in sizes.items():
        parts[name] = buffer[position : position + size * length].view(_DTYPES[size])
        position += -(-size * length // 8) * 8
    return buffer, parts
