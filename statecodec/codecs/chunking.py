"""Cutting a tensor into pieces that encode independently: bounded memory, parallel work, partial reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from statecodec.codecs.base import Codec
from statecodec.dtypes import DType

CHUNK_ELEMENTS = 1 << 20
PIECE_ELEMENTS = 1 << 22  # of a tensor that is one chunk, but decoded in pieces


@dataclass(frozen=True)
class Chunk:
    """Elements start..stop of the flattened tensor, seen as `shape` (rows, cols), or the tensor's own shape if it is
    whole.
    """

    start: int
    stop: int
    shape: tuple[int, ...]


def chunks(codec: Codec, shape: tuple[int, ...], dtype: DType, target: int = CHUNK_ELEMENTS) -> list[Chunk]:
    """The pieces, in order, about `target` elements each; one piece if the codec cannot be cut.

    Every piece's parts, concatenated byte by byte, are the parts of the whole tensor. A tensor without elements is one
    chunk.
    """
    return list(iterate(codec, shape, dtype, target))


def iterate(codec: Codec, shape: tuple[int, ...], dtype: DType, target: int = CHUNK_ELEMENTS) -> Iterator[Chunk]:
    """`chunks`, lazily."""
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
