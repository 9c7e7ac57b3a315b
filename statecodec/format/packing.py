"""Packing: a chunk's parts as byte planes, or narrowed codes, in one self-checking record.

    record  = table payload*                table = one row per plane, parts in order, planes from the least significant
    row     = method u8, length u32 (little-endian)

What a plane may be is in `planes`. Integer codes may be stored narrowed, or as what is left after a prediction,
instead: the whole part is the payload of its first row, and is a record itself.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import zstandard

from statecodec.buffers import Bytes, Pool
from statecodec.codecs import PartSpec, rows_cols
from statecodec.errors import FormatError, UsageError
from statecodec.format import narrowed, predicted
from statecodec.format.planes import (
    CENTRED,
    CENTRED_NIBBLES,
    CONSTANT,
    STORED,
    ZSTD,
    cpu_kernels,
    pack_plane,
    unpack_plane,
)  # fmt: skip
from statecodec.kernels.reference.planes import plane_layout
from statecodec.lazy import torch
from statecodec.limits import MAX_WINDOW

if TYPE_CHECKING:
    from torch import Tensor

NARROWED, WITHIN, PREDICTED = 5, 6, 7  # a part of codes: its first row, its others, its first row
ROW = struct.Struct("<BI")
Row: TypeAlias = tuple[int, int]  # method, length
Methods: TypeAlias = tuple[int, ...]  # of whole parts, those that a record may hold
P = TypeVar("P", "Tensor", PartSpec)
_ANY, _AFTER_PREDICTION, _AFTER_NARROWING = (NARROWED, PREDICTED), (NARROWED,), ()
_METHODS = ("none", "auto", "zstd", "predicted")
_EXPECTED = "none, or auto, zstd or predicted, each with or without :LEVEL"
_local = threading.local()


@dataclass(frozen=True)
class Packing:
    """How parts are compressed at rest.

    Args:
        method: `none`, `zstd`, `predicted` (zstd after a low-rank prediction of codes, where that is worth it), or
            `auto`: `predicted` for items that are of low rank, `zstd` for others.
        level: The zstd level; None for the measured parameters.

    Raises:
        UsageError: For another method, or a level that zstd does not have.
    """

    method: str = "zstd"
    level: int | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS or (self.method == "none" and self.level is not None):
            raise UsageError(f"packing {self}: expected {_EXPECTED}")
        if self.level is not None and not -50 <= self.level <= 22:
            raise UsageError(f"packing {self}: zstd levels are -50 to 22")

    @classmethod
    def parse(cls, text: str) -> Packing:
        """Make a packing from its text.

        Args:
            text: `none`; `auto`, `zstd` or `predicted`, or one of these three with `:LEVEL`.

        Returns:
            The packing.

        Raises:
            UsageError: If it cannot be read.
        """
        method, colon, level = text.partition(":")
        if colon and not level.removeprefix("-").isdecimal():
            raise UsageError(f"packing {text!r}: expected {_EXPECTED}")
        return cls(method, int(level) if colon else None)

    def __str__(self) -> str:
        return self.method if self.level is None else f"{self.method}:{self.level}"

    def settled(self, low_rank: bool) -> Packing:
        """Settle what `auto` is for an item.

        Args:
            low_rank: Whether its codes are close to a matrix of low rank.

        Returns:
            The packing, in which nothing is left open.
        """
        return replace(self, method="predicted" if low_rank else "zstd") if self.method == "auto" else self

    def compressor(self) -> Any:
        """This thread's zstd compressor."""
        compressors: dict[int | None, Any] = _local.__dict__.setdefault("compressors", {})
        if self.level not in compressors:
            make = zstandard.ZstdCompressionParameters
            if self.level is None:
                parameters = make(
                    strategy=zstandard.STRATEGY_FAST,
                    window_log=17,
                    hash_log=6,
                    chain_log=6,
                    search_log=1,
                    min_match=7,
                    target_length=0,
                )
            else:
                window = make.from_level(self.level).window_log
                parameters = make.from_level(self.level, window_log=min(window, MAX_WINDOW.bit_length() - 1))
            compressors[self.level] = zstandard.ZstdCompressor(compression_params=parameters)
        return compressors[self.level]


def encode_record(parts: Sequence[Tensor], packing: Packing, pool: Pool) -> tuple[Bytes, int]:
    """Pack contiguous CPU tensors into a pooled buffer; returns it and the record's length."""
    methods = _ANY if packing.method == "predicted" else _AFTER_PREDICTION
    buffer = pool.take(_room(parts, methods))
    return buffer, _write_record(parts, buffer, packing, pool, methods)


def _room(parts: Sequence[Tensor], methods: Methods) -> int:
    """Bytes that are enough to make a record in. A code can take three bytes until its part turns out not to narrow."""
    rows = sum(ROW.size * plane_layout(p.dtype)[0] for p in parts)
    factors = sum(predicted.slack(p) for p in parts) if PREDICTED in methods else 0
    return rows + factors + sum(p.nbytes + narrowed.slack(p) for p in parts)


def _write_record(parts: Sequence[Tensor], out: Bytes, packing: Packing, pool: Pool, methods: Methods) -> int:
    """Write a record and return its length."""
    table, position = list[Row](), ROW.size * sum(plane_layout(p.dtype)[0] for p in parts)
    compressor, view = packing.compressor(), out.data
    for part in parts:
        rest = out[position:]
        rows = _pack_codes(part, rest, packing, pool, methods) or _pack_planes(part, rest, compressor, pool)
        position += _length(rows)
        table += rows
    for number, row in enumerate(table):
        ROW.pack_into(view, number * ROW.size, *row)
    return position


def _pack_planes(part: Tensor, out: Bytes, compressor: Any, pool: Pool) -> list[Row]:
    """Write a part's planes, one after the other; returns their rows."""
    width = plane_layout(part.dtype)[0]
    n = part.nbytes // width
    if not n:
        return [(STORED, 0)] * width
    matrix, content = _matrix(part, n), part.view(-1).view(torch.uint8)
    zero = width > 1 and n > 1 and cpu_kernels().constant_byte(content) == 0
    planes = content.numpy().reshape(1, n) if width == 1 else out[: part.nbytes].reshape(width, n)
    if width > 1 and not zero:
        cpu_kernels().split_planes(part, torch.from_numpy(planes))
    rows, position, view = [], 0, out.data
    for plane in planes:
        method, payload = (CONSTANT, b"\0") if zero else pack_plane(plane.reshape(matrix), compressor, pool)
        data = plane.data if payload is None else payload
        if payload is not None or width > 1 or content.data_ptr() != _address(out):
            view[position : position + len(data)] = data
        rows.append((method, len(data)))
        position += len(data)
    return rows


def _pack_codes(part: Tensor, out: Bytes, packing: Packing, pool: Pool, methods: Methods) -> list[Row] | None:
    """Write a part as narrowed codes if nearly all of them are small, or predicted where that is less; its rows."""
    if not methods or not narrowed.takes(part):
        return None
    matrix = part.view(rows_cols(tuple(part.shape)))
    form = cpu_kernels().form_of(matrix)
    if form is None:
        return None
    method, length = PREDICTED, _write_predicted(matrix, form, out, packing, pool) if PREDICTED in methods else None
    if length is None:
        method, length = NARROWED, _write_narrowed(part, form.narrowing, out, packing, pool)
    if length is None or length >= part.nbytes:
        return None
    return [(method, length), *[(WITHIN, 0)] * (part.element_size() - 1)]


def _write_predicted(matrix: Tensor, form: narrowed.Form, out: Bytes, packing: Packing, pool: Pool) -> int | None:
    """Write the payload of codes after a prediction and return its length; None where that would save too little."""
    with predicted.split(matrix, form, pool) as found:
        if found is None:
            return None
        header, parts = found
        out.data[: len(header)] = header
        return len(header) + _write_record(parts, out[len(header) :], packing, pool, _AFTER_PREDICTION)


def _write_narrowed(
    part: Tensor, narrowing: narrowed.Narrowing, out: Bytes, packing: Packing, pool: Pool
) -> int | None:
    """Write the payload of a part in this form and return its length; None if it does not fit the form."""
    head = narrowed.HEADER.size
    rows = part.element_size() + sum(plane_layout(dtype)[0] for dtype, _ in narrowing.sizes(0).values())
    with narrowed.split(part, narrowing, pool, out[head + ROW.size * rows :]) as narrow:
        if narrow is None:
            return None
        header, parts = narrow
        out.data[:head] = header
        return head + _write_record(parts, out[head:], packing, pool, _AFTER_NARROWING)


def _address(buffer: Bytes) -> int:
    address: int = buffer.__array_interface__["data"][0]
    return address


def _matrix(part: Tensor, n: int) -> tuple[int, int]:
    """A plane of n bytes as rows along the part's last dimension (a complex element is two bytes of a row)."""
    cols = part.shape[-1] if part.ndim else 1
    rows = max(part.numel() // max(cols, 1), 1)
    return rows, n // rows


def decode_record(record: Bytes, outs: Sequence[Tensor], pool: Pool, methods: Methods = _ANY) -> None:
    """Unpack a record into contiguous CPU tensors, in a few times the memory that they take. Raises FormatError."""
    for out, rows, payload in _split(record, outs, methods):
        if rows[0][0] == NARROWED:
            narrowed.join(payload, out, pool, lambda rest, parts: _unpack_narrowed(rest, parts, pool))
        elif rows[0][0] == PREDICTED:
            predicted.join(payload, out, lambda rest, parts: decode_record(rest, parts, pool, _AFTER_PREDICTION))
        else:
            _unpack_planes(payload, rows, out, pool)


def _unpack_narrowed(record: Bytes, outs: Sequence[Tensor], pool: Pool) -> list[Tensor]:
    """Unpack the record within narrowed codes; bytes that are stored uncompressed are not copied."""
    vectors = []
    for out, rows, payload in _split(record, outs, _AFTER_NARROWING):
        if out.dtype == torch.uint8 and rows[0][0] == STORED:
            vectors.append(torch.from_numpy(payload))
        else:
            _unpack_planes(payload, rows, out, pool)
            vectors.append(out)
    return vectors


def decode_bytes(record: Bytes, specs: Sequence[PartSpec], part: int, pool: Pool) -> Bytes:
    """Unpack one vector of uint8 among the parts of a record, for which torch is not needed. Raises FormatError."""
    _, ((method, length),), payload = next(islice(_split(record, specs, _ANY), part, None))
    plane = np.empty(specs[part].nbytes, np.uint8)
    if length:
        unpack_plane(method, payload, plane.reshape(1, -1), pool)
    return plane


def _split(record: Bytes, outs: Sequence[P], methods: Methods) -> Iterator[tuple[P, list[Row], Bytes]]:
    """Each part with its rows and its payload."""
    table = _rows(record, outs, methods)
    position = ROW.size * sum(map(len, table))
    for out, rows in zip(outs, table, strict=True):
        stop = position + _length(rows)
        yield out, rows, record[position:stop]
        position = stop


def _length(rows: Sequence[Row]) -> int:
    """Bytes of the payload that these rows are of."""
    total = 0
    for _, length in rows:
        total += length
    return total


def _unpack_planes(payloads: Bytes, rows: Sequence[Row], out: Tensor, pool: Pool) -> None:
    width = len(rows)
    n = out.nbytes // width
    if not n:
        return
    matrix = _matrix(out, n)
    target = out.view(-1).view(torch.uint8).numpy()
    scratch = pool.take(width * n) if width > 1 else target
    planes, position = [], 0
    for k, (method, length) in enumerate(rows):
        plane = scratch[k * n : (k + 1) * n]
        payload = payloads[position : position + length]
        if method == STORED and width > 1:
            plane = payload  # not copied
        else:
            unpack_plane(method, payload, plane.reshape(matrix), pool)
        planes.append(torch.from_numpy(plane))
        position += length
    if width > 1:
        cpu_kernels().merge_planes(planes, out)
        pool.give(scratch)


def _rows(record: Bytes, outs: Sequence[P], methods: Methods) -> list[list[Row]]:
    """The table's rows, part by part, checked against the record and what the parts are."""
    widths = [plane_layout(out.dtype)[0] for out in outs]
    table = ROW.size * sum(widths)
    if record.size < table:
        raise FormatError(f"chunk record of {record.size} bytes: its table alone takes {table}")
    fields = list(ROW.iter_unpack(record[:table].data))
    rows, first, total = list[list[Row]](), 0, table
    for out, width in zip(outs, widths, strict=True):
        part_rows: list[Row] = fields[first : first + width]
        if part_rows[0][0] in methods and narrowed.takes(out):
            if not 0 < part_rows[0][1] < out.nbytes or part_rows[1:] != [(WITHIN, 0)] * (width - 1):
                raise FormatError(f"chunk record: rows {part_rows} of codes of {out.nbytes} bytes")
        else:
            for method, length in part_rows:
                _check_plane(method, length, out.nbytes // width)
        rows.append(part_rows)
        first, total = first + width, total + _length(part_rows)
    if total != record.size:
        raise FormatError(f"chunk record of {record.size} bytes: its planes do not fill it")
    return rows


def _check_plane(method: int, length: int, n: int) -> None:
    if method == STORED:
        fits = length == n
    elif method == CONSTANT:
        fits = length == 1 and n > 1
    elif method in (ZSTD, CENTRED, CENTRED_NIBBLES):
        fits = 0 < length < n
    else:
        raise FormatError(f"chunk record: unknown method {method} of a plane")
    if not fits:
        raise FormatError(f"chunk record: method {method} with {length} bytes for a plane of {n}")
