"""A byte plane: stored, compressed, constant or centred, whichever is smallest.

zstd runs with its match finder all but off: on exponents and codes, whose redundancy is their histogram, that packs
better and faster than level 1. Planes of noise are found by a sample and stored. Planes that are close to a row term
plus a column term (second moments are) are centred first; see `statecodec.kernels.reference.centring`.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from statecodec.buffers import Bytes, Pool
from statecodec.format.frames import decompress

STORED, ZSTD, CONSTANT, CENTRED, CENTRED_NIBBLES = range(5)
WORTH = 0.97  # a plane is compressed only below this share of its size
SAMPLE = 4096  # bytes in each of four samples of a plane
CENTRE_FROM = 16  # rows and columns a plane needs for its means to pay
CENTRE_SAMPLE = 1024  # columns of the 64 rows that decide about it
CENTRE_WORTH = 0.98  # centred only where a sample's entropy falls below this share


def pack_plane(matrix: Bytes, compressor: Any, pool: Pool) -> tuple[int, bytes | None]:
    """Pack a plane: (method, payload); payload None means the plane as it is."""
    plane = matrix.reshape(-1)
    n = plane.size
    if n < 2:
        return STORED, None
    if plane[0] == plane[-1] and cpu_kernels().planes.constant(plane) >= 0:
        return CONSTANT, plane[:1].tobytes()
    if n >= 8 * SAMPLE:
        pieces = [plane[at : at + SAMPLE] for at in range(0, n - SAMPLE + 1, (n - SAMPLE) // 3)]
        sample = np.concatenate(pieces)
        if len(compressor.compress(sample)) > WORTH * sample.size:
            return STORED, None
    method = form(matrix)
    frame = compressor.compress(plane) if method == ZSTD else _compress_centred(matrix, method, compressor, pool)
    return (method, frame) if len(frame) <= WORTH * n else (STORED, None)


def form(matrix: Bytes) -> int:
    """ZSTD, CENTRED or CENTRED_NIBBLES: whichever leaves a sample of the rows with the least entropy."""
    if min(matrix.shape) < CENTRE_FROM:
        return ZSTD
    sample = np.ascontiguousarray(matrix[:: -(-matrix.shape[0] // 64), :CENTRE_SAMPLE])
    columns, lines, rest = (np.empty(n, np.uint8) for n in (sample.shape[1], sample.shape[0], sample.size))
    best, least = ZSTD, CENTRE_WORTH * _entropy(sample)
    for method in (CENTRED, CENTRED_NIBBLES):
        cpu_kernels().centre(sample, columns, lines, rest.reshape(sample.shape), nibbles=method == CENTRED_NIBBLES)
        entropy = _entropy(rest)
        if entropy < least:
            best, least = method, entropy
    return best


def _entropy(sample: Bytes) -> float:
    """Order-0 entropy in bits per byte."""
    counts = cpu_kernels().byte_counts(sample).numpy()
    share = counts[counts > 0] / sample.size
    return -float((share * np.log2(share)).sum())


def _compress_centred(matrix: Bytes, method: int, compressor: Any, pool: Pool) -> bytes:
    rows, cols = matrix.shape
    buffer = pool.take(cols + rows + matrix.size)
    content = buffer[: cols + rows + matrix.size]
    columns, lines, residual = np.split(content, [cols, cols + rows])
    nibbles = method == CENTRED_NIBBLES
    cpu_kernels().centre(matrix, columns, lines, residual.reshape(rows, cols), nibbles=nibbles)
    frame: bytes = compressor.compress(content)
    pool.give(buffer)
    return frame


def unpack_plane(method: int, payload: Bytes, matrix: Bytes, pool: Pool) -> None:
    """The inverse of `pack_plane`, into `matrix`. Raises FormatError."""
    plane = matrix.reshape(-1)
    if method == STORED:
        plane[:] = payload
    elif method == CONSTANT:
        plane.fill(payload[0])
    elif method == ZSTD:
        decompress(payload, plane)
    else:
        rows, cols = matrix.shape
        buffer = pool.take(cols + rows + plane.size)
        content = buffer[: cols + rows + plane.size]
        decompress(payload, content)
        columns, lines, residual = np.split(content, [cols, cols + rows])
        nibbles = method == CENTRED_NIBBLES
        cpu_kernels().uncentre(residual.reshape(rows, cols), columns, lines, matrix, nibbles=nibbles)
        pool.give(buffer)


@cache
def cpu_kernels() -> ModuleType:
    """The kernels for CPUs, imported on first use: numba takes a while, and looking into a file does not need it."""
    from statecodec.kernels import cpu

    return cpu
