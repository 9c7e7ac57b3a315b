"""Cutting a tensor into pieces that encode independently: bounded memory, parallel work, partial reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from statecodec.codecs.base import Codec
from statecodec.dtypes import DType

CHUNK_ELEMENTS = 1 << 20
PIECE_ELEMENTS = 1 << 22  # elements of a piece, where one chunk is decoded in pieces


@dataclass(frozen=True)
class Chunk:
    """A range of elements of a flattened tensor, and the shape that it is encoded in.

    Args:
        start: The first element.
        stop: One past the last element.
        shape: (rows, cols); of a whole tensor its own shape.
    """

    start: int
    stop: int
    shape: tuple[int, ...]


def chunks(codec: Codec, shape: tuple[int, ...], dtype: DType, target: int = CHUNK_ELEMENTS) -> list[Chunk]:
    """Cut a tensor into pieces that are encoded one by one.

    Every piece's parts, concatenated byte by byte, are the parts of the whole tensor. A tensor without elements is one
    chunk.

    Args:
        codec: How it will be encoded.
        shape: The tensor's shape.
        dtype: The tensor's dtype.
        target: About how many elements a piece has.

    Returns:
        The pieces in order; one piece if the codec cannot be cut.
    """
    return list(iterate(codec, shape, dtype, target))


def by_rows(start: int, stop: int, cols: int) -> Iterator[Chunk]:
    """Cut any range of a matrix into whole rows and what lies within one row, as `Codec.decode_piece` takes them.

    Args:
        start: The first element.
        stop: One past the last element.
        cols: The matrix's columns.
    """
    while start < stop:
        whole = (stop - start) // cols if start % cols == 0 else 0
        end = start + whole * cols if whole else min(stop, (start // cols + 1) * cols)
        yield Chunk(start, end, (whole, cols) if whole else (1, end - start))
        start = end


def iterate(codec: Codec, shape: tuple[int, ...], dtype: DType, target: int = CHUNK_ELEMENTS) -> Iterator[Chunk]:
    """Like `chunks`, one after the other."""
    total = math.prod(shape)
    align = codec.align(shape)
    if align is None or total <= target:
        yield Chunk(0, total, shape)
        return
    rows, cols = codec.rows_cols(shape)
    if cols <= target:
        height = max(1, target // cols)
        for row in range(0, rows, height):
            stop = min(row + height, rows)
            yield Chunk(row * cols, stop * cols, (stop - row, cols))
        return
    width = max(align, target // align * align)
    for row in range(rows):
        for col in range(0, cols, width):
            stop = min(col + width, cols)
            yield Chunk(row * cols + col, row * cols + stop, (1, stop - col))
