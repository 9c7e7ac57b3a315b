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
from itertools import islice, starmap
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

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
from statecodec.format.words import Planes, Words, words_of
from statecodec.limits import MAX_WINDOW

if TYPE_CHECKING:
    from torch import Tensor

NARROWED, WITHIN, PREDICTED = 5, 6, 7  # a part of codes: its first row, its others, its first row
ROW = struct.Struct("<BI")
Row: TypeAlias = tuple[int, int]  # method, length
Codes: TypeAlias = "NDArray[Any]"  # int16 or int32
Methods: TypeAlias = tuple[int, ...]  # of whole parts, those that a record may hold
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
    words = [words_of(part) for part in parts]
    buffer = pool.take(_room(words, methods))
    return buffer, _write_record(words, buffer, packing, pool, methods)


def _room(parts: Sequence[Words], methods: Methods) -> int:
    """Bytes that are enough to make a record in. A code can take three bytes until its part turns out not to narrow."""
    total = 0
    for part in parts:
        total += ROW.size * part.array.itemsize + part.array.nbytes + narrowed.slack(part)
        if PREDICTED in methods:
            total += predicted.slack(part)
    return total


def _write_record(parts: Sequence[Words], out: Bytes, packing: Packing, pool: Pool, methods: Methods) -> int:
    """Write a record and return its length."""
    table, position = list[Row](), 0
    for part in parts:
        position += ROW.size * part.array.itemsize
    compressor = packing.compressor()
    for part in parts:
        rest, rows = out[position:], None
        if methods and part.planes.codes:
            rows = _pack_codes(part, rest, packing, pool, methods)
        if rows is None:
            rows = _pack_planes(part, rest, compressor, pool)
        position += _length(rows)
        table += rows
    rows_packed = b"".join(starmap(ROW.pack, table))
    out.data[: len(rows_packed)] = rows_packed
    return position


def _pack_planes(part: Words, out: Bytes, compressor: Any, pool: Pool) -> list[Row]:
    """Write a part's planes, one after the other; returns their rows."""
    array, kernels = part.array, cpu_kernels().planes
    width, n = array.itemsize, array.size
    if not n:
        return [(STORED, 0)] * width
    if width == 1:
        planes = array.reshape(1, n)
    else:
        if n > 1 and kernels.constant(array.view(np.uint8)) == 0:
            out[:width] = 0
            return [(CONSTANT, 1)] * width
        planes = out[: array.nbytes].reshape(width, n)
        kernels.split_words(part.unsigned, planes, part.rotate)
    matrix, rows, position = part.matrix, [], 0
    for plane in planes:
        method, payload = pack_plane(plane.reshape(matrix), compressor, pool)
        data = plane if payload is None else np.frombuffer(payload, np.uint8)
        if payload is not None or width > 1 or _address(plane) != _address(out):
            out[position : position + data.size] = data
        rows.append((method, data.size))
        position += data.size
    return rows


def _pack_codes(part: Words, out: Bytes, packing: Packing, pool: Pool, methods: Methods) -> list[Row] | None:
    """Write a part as narrowed codes if nearly all of them are small, or predicted where that is less; its rows."""
    matrix = part.array.reshape(rows_cols(part.shape))
    form = cpu_kernels().form_of(matrix)
    if form is None:
        return None
    method, length = PREDICTED, _write_predicted(matrix, form, out, packing, pool) if PREDICTED in methods else None
    if length is None:
        method, length = NARROWED, _write_narrowed(part.array, form.narrowing, out, packing, pool)
    if length is None or length >= part.array.nbytes:
        return None
    return [(method, length), *[(WITHIN, 0)] * (part.array.itemsize - 1)]


def _write_predicted(matrix: Codes, form: narrowed.Form, out: Bytes, packing: Packing, pool: Pool) -> int | None:
    """Write the payload of codes after a prediction and return its length; None where that would save too little."""
    with predicted.split(matrix, form, pool) as found:
        if found is None:
            return None
        header, parts = found
        out.data[: len(header)] = header
        return len(header) + _write_record(parts, out[len(header) :], packing, pool, _AFTER_PREDICTION)


def _write_narrowed(
    codes: Codes, narrowing: narrowed.Narrowing, out: Bytes, packing: Packing, pool: Pool
) -> int | None:
    """Write the payload of codes in this form and return its length; None if they do not fit the form."""
    head = narrowed.HEADER.size
    with narrowed.split(codes, narrowing, pool, out[head + ROW.size * narrowed.planes(codes.itemsize) :]) as narrow:
        if narrow is None:
            return None
        header, parts = narrow
        out.data[:head] = header
        return head + _write_record(parts, out[head:], packing, pool, _AFTER_NARROWING)


def _address(buffer: Bytes) -> int:
    address: int = buffer.__array_interface__["data"][0]
    return address


def decode_record(record: Bytes, outs: Sequence[Tensor], pool: Pool) -> None:
    """Unpack a record into contiguous CPU tensors, in a few times the memory that they take. Raises FormatError."""
    _unpack_record(record, [words_of(out) for out in outs], pool, _ANY)


def _unpack_record(record: Bytes, outs: Sequence[Words], pool: Pool, methods: Methods) -> None:
    for out, (rows, payload) in zip(outs, _split(record, [out.planes for out in outs], methods), strict=True):
        if rows[0][0] == NARROWED:
            narrowed.join(payload, out.array, pool, lambda rest, parts: _unpack_narrowed(rest, parts, pool))
        elif rows[0][0] == PREDICTED:
            predicted.join(payload, out, lambda rest, parts: _unpack_record(rest, parts, pool, _AFTER_PREDICTION))
        else:
            _unpack_planes(payload, rows, out, pool)


def _unpack_narrowed(record: Bytes, outs: Sequence[Words], pool: Pool) -> list[NDArray[Any]]:
    """Unpack the record within narrowed codes; bytes that are stored uncompressed are not copied."""
    vectors = []
    for out, (rows, payload) in zip(outs, _split(record, [out.planes for out in outs], _AFTER_NARROWING), strict=True):
        if out.array.itemsize == 1 and rows[0][0] == STORED:
            vectors.append(payload)
        else:
            _unpack_planes(payload, rows, out, pool)
            vectors.append(out.array)
    return vectors


def decode_bytes(record: Bytes, specs: Sequence[PartSpec], part: int, pool: Pool) -> Bytes:
    """Unpack one vector of uint8 among the parts of a record, for which torch is not needed. Raises FormatError."""
    ((method, length),), payload = next(islice(_split(record, [Planes.of(spec) for spec in specs], _ANY), part, None))
    plane = np.empty(specs[part].nbytes, np.uint8)
    if length:
        unpack_plane(method, payload, plane.reshape(1, -1), pool)
    return plane


def _split(record: Bytes, outs: Sequence[Planes], methods: Methods) -> Iterator[tuple[list[Row], Bytes]]:
    """Each part's rows and its payload."""
    position = ROW.size * sum(out.width for out in outs)
    for rows in _rows(record, outs, methods):
        stop = position + _length(rows)
        yield rows, record[position:stop]
        position = stop


def _length(rows: Sequence[Row]) -> int:
    """Bytes of the payload that these rows are of."""
    total = 0
    for _, length in rows:
        total += length
    return total


def _unpack_planes(payloads: Bytes, rows: Sequence[Row], out: Words, pool: Pool) -> None:
    width, n, matrix = len(rows), out.array.size, out.matrix
    if not n:
        return
    scratch = pool.take(width * n) if width > 1 else out.array
    planes, position = [], 0
    for k, (method, length) in enumerate(rows):
        plane = scratch[k * n : (k + 1) * n]
        payload = payloads[position : position + length]
        if method == STORED and width > 1:
            plane = payload  # not copied
        else:
            unpack_plane(method, payload, plane.reshape(matrix), pool)
        planes.append(plane)
        position += length
    if width > 1:
        cpu_kernels().planes.merge_words(planes, out.unsigned, out.rotate)
        pool.give(scratch)


def _rows(record: Bytes, outs: Sequence[Planes], methods: Methods) -> list[list[Row]]:
    """The table's rows, part by part, checked against the record and what the parts are."""
    table = ROW.size * sum(out.width for out in outs)
    if record.size < table:
        raise FormatError(f"chunk record of {record.size} bytes: its table alone takes {table}")
    fields = list(ROW.iter_unpack(record[:table].data))
    rows, first, total = list[list[Row]](), 0, table
    for width, nbytes, codes in outs:
        part_rows: list[Row] = fields[first : first + width]
        if part_rows[0][0] in methods and codes:
            if not 0 < part_rows[0][1] < nbytes or part_rows[1:] != [(WITHIN, 0)] * (width - 1):
                raise FormatError(f"chunk record: rows {part_rows} of codes of {nbytes} bytes")
        else:
            for method, length in part_rows:
                _check_plane(method, length, nbytes // width)
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
