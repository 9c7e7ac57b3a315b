"""Packing: a chunk's parts as byte planes, each stored, compressed or constant, in one self-checking record.

    record  = table payload*                table = one row per plane, parts in order, planes from the least significant
    row     = method u8, length u32 (little-endian)

zstd runs with its match finder all but off: on exponents and codes, whose redundancy is their histogram, that packs
better and faster than level 1. Planes of noise are found by a sample and stored. Planes that are close to a row term
plus a column term (second moments are) are centred first; see `statecodec.kernels.reference.centring`.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from statecodec.buffers import Bytes, Pool
from statecodec.codecs import PartSpec, rows_cols
from statecodec.errors import CorruptFile, FormatError, UsageError
from statecodec.kernels.reference.planes import plane_layout
from statecodec.limits import MAX_WINDOW

STORED, ZSTD, CONSTANT, CENTRED, CENTRED_NIBBLES = range(5)
ROW = struct.Struct("<BI")
WORTH = 0.97  # a plane is compressed only below this share of its size
SAMPLE = 4096  # bytes in each of four samples of a plane
CENTRE_FROM = 16  # rows and columns a plane needs for its means to pay
CENTRE_SAMPLE = 1024  # columns of the 64 rows that decide about it
CENTRE_WORTH = 0.98  # centred only where a sample's entropy falls below this share
_MAGIC = b"\x28\xb5\x2f\xfd"
_local = threading.local()


@dataclass(frozen=True)
class Packing:
    """What is done at rest: `none`, or `zstd` with the measured parameters, or with those of a zstd level."""

    method: str = "zstd"
    level: int | None = None

    def __post_init__(self) -> None:
        if self.method not in ("none", "zstd") or (self.method == "none" and self.level is not None):
            raise UsageError(f"packing {self}: expected none, zstd or zstd:LEVEL")
        if self.level is not None and not -50 <= self.level <= 22:
            raise UsageError(f"packing {self}: zstd levels are -50 to 22")

    @classmethod
    def parse(cls, text: str) -> Packing:
        """`none`, `zstd` or `zstd:LEVEL`. Raises UsageError."""
        method, colon, level = text.partition(":")
        if colon and not level.removeprefix("-").isdecimal():
            raise UsageError(f"packing {text!r}: expected none, zstd or zstd:LEVEL")
        return cls(method, int(level) if colon else None)

    def __str__(self) -> str:
        return self.method if self.level is None else f"{self.method}:{self.level}"

    def compressor(self) -> Any:
        """This thread's zstd compressor."""
        made: dict[Packing, Any] = _local.__dict__.setdefault("compressors", {})
        if self not in made:
            make = zstandard.ZstdCompressionParameters
            if self.level is None:
                parameters = make(
                    strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7,
                    target_length=0,
                )  # fmt: skip
            else:
                window = make.from_level(self.level).window_log
                parameters = make.from_level(self.level, window_log=min(window, MAX_WINDOW.bit_length() - 1))
            made[self] = zstandard.ZstdCompressor(compression_params=parameters)
        return made[self]


def max_record_size(specs: Mapping[str, PartSpec]) -> int:
    """The largest record that parts of these dtypes and shapes can give."""
    return sum(spec.nbytes + ROW.size * plane_layout(spec.dtype)[0] for spec in specs.values())


def encode_record(parts: Sequence[Tensor], packing: Packing, pool: Pool) -> tuple[Bytes, int]:
    """Pack contiguous CPU tensors into a pooled buffer; returns it and the record's length."""
    table = ROW.size * sum(plane_layout(p.dtype)[0] for p in parts)
    buffer = pool.take(table + sum(p.nbytes for p in parts))
    view, compressor = buffer.data, packing.compressor()
    row, position = 0, table
    for part in parts:
        width = plane_layout(part.dtype)[0]
        n = part.nbytes // width
        matrix = _matrix(part, n)
        planes = buffer[position : position + part.nbytes].reshape(width, n)
        zero = n > 1 and _kernels().constant_byte(part.view(-1).view(torch.uint8)) == 0
        if n and not zero:
            _kernels().split_planes(part, torch.from_numpy(planes))
        source = position
        for k in range(width):
            method, payload = (CONSTANT, b"\0") if zero else _pack_plane(planes[k].reshape(matrix), compressor, pool)
            length = n if payload is None else len(payload)
            if payload is not None:
                view[position : position + length] = payload
            elif source != position:
                view[position : position + n] = view[source : source + n]
            ROW.pack_into(view, row, method, length)
            row, position, source = row + ROW.size, position + length, source + n
    return buffer, position


def _matrix(part: Tensor, n: int) -> tuple[int, int]:
    """A plane of n bytes as rows: those of the part (a complex element is two bytes of a row)."""
    rows = max(rows_cols(tuple(part.shape))[0], 1)
    return rows, n // rows


def _pack_plane(matrix: Bytes, compressor: Any, pool: Pool) -> tuple[int, bytes | None]:
    """(method, payload); payload None means the plane as it is."""
    plane = matrix.reshape(-1)
    n = plane.size
    if n < 2:
        return STORED, None
    value = _kernels().constant_byte(torch.from_numpy(plane))
    if value >= 0:
        return CONSTANT, bytes([value])
    if n >= 8 * SAMPLE:
        pieces = [plane[at : at + SAMPLE] for at in range(0, n - SAMPLE + 1, (n - SAMPLE) // 3)]
        sample = np.concatenate(pieces)
        if len(compressor.compress(sample)) > WORTH * sample.size:
            return STORED, None
    method = _form(matrix)
    frame = compressor.compress(plane) if method == ZSTD else _compress_centred(matrix, method, compressor, pool)
    return (method, frame) if len(frame) <= WORTH * n else (STORED, None)


def _form(matrix: Bytes) -> int:
    """ZSTD, CENTRED or CENTRED_NIBBLES: whichever leaves a sample of the rows with the least entropy."""
    if min(matrix.shape) < CENTRE_FROM:
        return ZSTD
    sample = torch.from_numpy(np.ascontiguousarray(matrix[:: -(-matrix.shape[0] // 64), :CENTRE_SAMPLE]))
    columns, lines, rest = (
        torch.empty(n, dtype=torch.uint8, device="cpu") for n in (sample.shape[1], sample.shape[0], sample.numel())
    )
    best, least = ZSTD, CENTRE_WORTH * _entropy(sample)
    for method in (CENTRED, CENTRED_NIBBLES):
        _kernels().centre(sample, columns, lines, rest.view(sample.shape), nibbles=method == CENTRED_NIBBLES)
        entropy = _entropy(rest)
        if entropy < least:
            best, least = method, entropy
    return best


def _entropy(sample: Tensor) -> float:
    """Order-0 entropy in bits per byte."""
    counts = _kernels().byte_counts(sample)
    share = counts[counts > 0].double() / sample.numel()
    return -float((share * share.log2()).sum())


def _compress_centred(matrix: Bytes, method: int, compressor: Any, pool: Pool) -> bytes:
    rows, cols = matrix.shape
    buffer = pool.take(cols + rows + matrix.size)
    content = torch.from_numpy(buffer[: cols + rows + matrix.size])
    columns, lines, residual = content.split_with_sizes([cols, rows, matrix.size])
    nibbles = method == CENTRED_NIBBLES
    _kernels().centre(torch.from_numpy(matrix), columns, lines, residual.view(rows, cols), nibbles=nibbles)
    frame: bytes = compressor.compress(content.numpy())
    pool.give(buffer)
    return frame


def decode_record(record: Bytes, outs: Sequence[Tensor], pool: Pool) -> None:
    """Unpack a record into contiguous CPU tensors, in no more memory than they take. Raises FormatError."""
    rows = _rows(record, outs)
    position = ROW.size * len(rows)
    row = 0
    for out in outs:
        width = plane_layout(out.dtype)[0]
        n = out.nbytes // width
        matrix = _matrix(out, n)
        target = out.view(-1).view(torch.uint8).numpy()
        scratch = pool.take(width * n) if width > 1 else target
        planes = []
        for k in range(width):
            method, length = rows[row]
            plane = scratch[k * n : (k + 1) * n]
            payload = record[position : position + length]
            if method == STORED and width > 1:
                plane = payload  # merged from where it lies
            else:
                _unpack_plane(method, payload, plane.reshape(matrix), pool)
            planes.append(torch.from_numpy(plane))
            row, position = row + 1, position + length
        if width > 1:
            if n:
                _kernels().merge_planes(planes, out)
            pool.give(scratch)


def _rows(record: Bytes, outs: Sequence[Tensor]) -> list[tuple[int, int]]:
    sizes = [out.nbytes // width for out in outs for width in [plane_layout(out.dtype)[0]] for _ in range(width)]
    table = ROW.size * len(sizes)
    if record.size < table:
        raise FormatError(f"chunk record of {record.size} bytes: its table alone takes {table}")
    rows: list[tuple[int, int]] = list(ROW.iter_unpack(record[:table].data))
    for (method, length), n in zip(rows, sizes, strict=True):
        packed = 0 < length < n
        fits = {
            STORED: length == n,
            CONSTANT: length == 1 and n > 1,
            **dict.fromkeys((ZSTD, CENTRED, CENTRED_NIBBLES), packed),
        }
        if method not in fits:
            raise FormatError(f"chunk record: unknown method {method} of a plane")
        if not fits[method]:
            raise FormatError(f"chunk record: method {method} with {length} bytes for a plane of {n}")
    if table + sum(length for _, length in rows) != record.size:
        raise FormatError(f"chunk record of {record.size} bytes: its planes do not fill it")
    return rows


def _unpack_plane(method: int, payload: Bytes, matrix: Bytes, pool: Pool) -> None:
    plane = matrix.reshape(-1)
    if method == STORED:
        plane[:] = payload
    elif method == CONSTANT:
        plane.fill(payload[0])
    elif method == ZSTD:
        _decompress(payload, plane)
    else:
        rows, cols = matrix.shape
        buffer = pool.take(cols + rows + plane.size)
        content = buffer[: cols + rows + plane.size]
        _decompress(payload, content)
        columns, lines, residual = torch.from_numpy(content).split_with_sizes([cols, rows, plane.size])
        nibbles = method == CENTRED_NIBBLES
        _kernels().uncentre(residual.view(rows, cols), columns, lines, torch.from_numpy(matrix), nibbles=nibbles)
        pool.give(buffer)


def _decompress(frame: Bytes, plane: Bytes) -> None:
    """One zstd frame into a plane of exactly its size. What the frame says of itself is checked before it is run."""
    if frame[:4].tobytes() != _MAGIC:
        raise FormatError("a compressed plane is not a zstd frame")
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    try:
        said = zstandard.get_frame_parameters(frame.data)
        if said.content_size != plane.size or said.window_size > MAX_WINDOW or said.dict_id:
            raise FormatError(
                f"zstd frame of {said.content_size} bytes, window {said.window_size}; expected {plane.size} bytes, "
                f"window at most {MAX_WINDOW}"
            )
        with _local.decompressor.stream_reader(frame.data) as stream:
            done, target = 0, plane.data
            while done < plane.size and (n := stream.readinto(target[done:])):
                done += n
            if done != plane.size or stream.read(1):
                raise CorruptFile(f"a compressed plane gives {done} bytes, expected {plane.size}")
    except zstandard.ZstdError as error:
        raise CorruptFile(f"a compressed plane cannot be unpacked: {error}") from error


@cache
def _kernels() -> ModuleType:
    # Imported on first use: numba takes a while, and looking into a file does not need it.
    from statecodec.kernels import cpu

    return cpu
