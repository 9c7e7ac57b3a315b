"""Parts of integer codes in their narrowed form: the header in front of the record, writing and reading.

    payload = flags u8 (1: nibbles), low u8, columns u32, exceptions u32, then a record of the narrowed parts

`statecodec.kernels.reference.narrowing` says what the parts are, `forms` beside it which form is taken. Columns are 0
where no terms were taken out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from statecodec.buffers import Bytes, Pool
from statecodec.codecs import PartSpec
from statecodec.dtypes import name_of
from statecodec.errors import FormatError
from statecodec.format.planes import cpu_kernels
from statecodec.kernels.reference.narrowing import LOW_BITS, MOST_EXCEPTIONS, Form, Narrowing
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LOW_BITS", "Form", "Narrowing", "join", "split", "takes"]

Unpack: TypeAlias = "Callable[[Bytes, Sequence[Tensor]], list[Tensor]]"  # record, memory for its parts -> its parts

HEADER = struct.Struct("<BBII")
SMALLEST = 64  # codes; fewer are planes


def takes(part: Tensor | PartSpec) -> bool:
    """Whether a part can be narrowed."""
    return name_of(part.dtype) in ("int16", "int32") and part.nbytes >= SMALLEST * part.dtype.itemsize


def slack(part: Tensor) -> int:
    """How many bytes more than the part its narrowed form can take, with header and rows."""
    if not takes(part):
        return 0
    narrowing = Narrowing(1 if part.dtype == torch.int16 else 0, max(LOW_BITS))
    parts = sum(dtype.itemsize * length for dtype, length in narrowing.sizes(part.numel()).values())
    return max(parts + part.nbytes // MOST_EXCEPTIONS - part.nbytes, 0) + 128


@contextmanager
def split(part: Tensor, narrowing: Narrowing, pool: Pool, room: Bytes) -> Iterator[tuple[bytes, list[Tensor]] | None]:
    """The header and the narrowed parts of `part`, in pooled memory; None if the form does not fit.

    Low bytes and bits, which are noise and stored as they are, are in `room` if nothing is stored before them.
    """
    flat = part.view(-1)
    buffer, parts = _take(narrowing, flat.numel(), pool)
    if not narrowing.cols:
        position = 0
        for name in ("bytes", "bits"):
            n = parts[name].numel()
            parts[name] = torch.from_numpy(room[position : position + n])
            position += n
    few = pool.take(flat.nbytes // MOST_EXCEPTIONS)
    exceptions = torch.from_numpy(few[: flat.numel() // MOST_EXCEPTIONS * flat.element_size()]).view(flat.dtype)
    count = cpu_kernels().narrow(flat, narrowing, parts, exceptions)
    if count < 0:
        yield None
    else:
        header = HEADER.pack(narrowing.nibbles, narrowing.low, narrowing.cols, count)
        yield header, [*parts.values(), exceptions[:count]]
    pool.give(few)
    pool.give(buffer)


def join(payload: Bytes, out: Tensor, pool: Pool, unpack: Unpack) -> None:
    """Widen a payload into `out`; `unpack` gives the parts of the record within it, in these tensors or in others.

    Raises FormatError.
    """
    flat = out.view(-1)
    narrowing, count = _header(payload, flat)
    buffer, parts = _take(narrowing, flat.numel(), pool)
    room = torch.empty(count, dtype=flat.dtype, device="cpu")
    *unpacked, exceptions = unpack(payload[HEADER.size :], [*parts.values(), room])
    if not cpu_kernels().widen(dict(zip(parts, unpacked, strict=True)), exceptions, narrowing, flat):
        raise FormatError(f"narrowed codes: {count} exceptions are listed, the symbols say otherwise")
    pool.give(buffer)


def _header(payload: Bytes, flat: Tensor) -> tuple[Narrowing, int]:
    n = flat.numel()
    if payload.size < HEADER.size:
        raise FormatError(f"narrowed codes in {payload.size} bytes: their header alone takes {HEADER.size}")
    flags, low, cols, count = HEADER.unpack(payload[: HEADER.size].data)
    centred = cols == 0 or (flat.dtype == torch.int16 and n % cols == 0)
    if flags > 1 or low not in LOW_BITS or not centred or count > n // MOST_EXCEPTIONS:
        raise FormatError(
            f"narrowed codes: flags {flags}, {low} low bits, {cols} columns, {count} exceptions of {n} {flat.dtype}"
        )
    return Narrowing(cols, low, flags == 1), count


def _take(narrowing: Narrowing, n: int, pool: Pool) -> tuple[Bytes, dict[str, Tensor]]:
    """Pooled memory for the narrowed parts of n codes."""
    sizes = narrowing.sizes(n)
    buffer = pool.take(sum(dtype.itemsize * length + 8 for dtype, length in sizes.values()))
    parts, position = {}, 0
    for name, (dtype, length) in sizes.items():
        nbytes = dtype.itemsize * length
        parts[name] = torch.from_numpy(buffer[position : position + nbytes]).view(dtype)
        position += -(-nbytes // 8) * 8
    return buffer, parts
