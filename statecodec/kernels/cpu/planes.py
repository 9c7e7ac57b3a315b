"""Byte planes in numba: split words into one array per byte, and merge them again (`format.words`).

`split` works on blocks that stay in the first-level cache and writes one plane per loop: LLVM vectorises a loop with
one output, but gives up on four at once (too many alias checks). `merge` has one output and vectorises as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statecodec.kernels.cpu.compiled import compiled

Array = NDArray[Any]
_UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_BLOCK = 4096


def _splitter(width: int) -> Any:
    """The split loop for one element width: a constant, so that the shifts are constants and stay narrow."""
    word = _UNSIGNED[width]
    top = 8 * width - 1

    @compiled
    def split(x: Array, planes: Array, rotate: bool) -> None:
        rotated = np.empty(_BLOCK, x.dtype)
        for start in range(0, x.size, _BLOCK):
            n = min(_BLOCK, x.size - start)
            source = x[start : start + n]
            if rotate:
                for i in range(n):
                    rotated[i] = word(source[i] << word(1)) | word(source[i] >> word(top))
                source = rotated[:n]
            for k in range(width):
                out = planes[k, start : start + n]
                for i in range(n):
                    out[i] = np.uint8(source[i] >> word(8 * k))

    return split


@compiled
def _merge2(p0: Array, p1: Array, out: Array, rotate: bool) -> None:
    u: Any = np.uint16
    if rotate:
        for i in range(out.size):
            word = u(p0[i]) | u(u(p1[i]) << u(8))
            out[i] = u(word >> u(1)) | u(word << u(15))
    else:
        for i in range(out.size):
            out[i] = u(p0[i]) | u(u(p1[i]) << u(8))


@compiled
def _merge4(p0: Array, p1: Array, p2: Array, p3: Array, out: Array, rotate: bool) -> None:
    u: Any = np.uint32
    if rotate:
        for i in range(out.size):
            word = u(p0[i]) | (u(p1[i]) << u(8)) | (u(p2[i]) << u(16)) | (u(p3[i]) << u(24))
            out[i] = u(word >> u(1)) | u(word << u(31))
    else:
        for i in range(out.size):
            out[i] = u(p0[i]) | (u(p1[i]) << u(8)) | (u(p2[i]) << u(16)) | (u(p3[i]) << u(24))


@compiled
def _merge8(
    p0: Array, p1: Array, p2: Array, p3: Array, p4: Array, p5: Array, p6: Array, p7: Array, out: Array, rotate: bool
) -> None:
    u: Any = np.uint64
    for i in range(out.size):
        low = u(p0[i]) | (u(p1[i]) << u(8)) | (u(p2[i]) << u(16)) | (u(p3[i]) << u(24))
        high = u(p4[i]) | (u(p5[i]) << u(8)) | (u(p6[i]) << u(16)) | (u(p7[i]) << u(24))
        word = low | (high << u(32))
        out[i] = ((word >> u(1)) | (word << u(63))) if rotate else word


@compiled
def _constant(x: Array) -> int:
    first = x[0]
    for start in range(0, x.size, _BLOCK):
        block = x[start : start + _BLOCK]
        different = np.uint8(0)
        for i in range(block.size):
            different |= block[i] ^ first
        if different:
            return -1
    return int(first)


_SPLIT = {width: _splitter(width) for width in (2, 4, 8)}
_MERGE: dict[int, Any] = {2: _merge2, 4: _merge4, 8: _merge8}


def split_words(words: Array, planes: Array, rotate: bool) -> None:
    """Split unsigned words of two bytes and more (flat) into `planes` (uint8, width x n)."""
    _SPLIT[words.itemsize](words, planes, rotate)


def merge_words(planes: Sequence[Array], words: Array, rotate: bool) -> None:
    """The inverse. Raises ValueError if a plane has another length: kernels do not look."""
    if any(plane.size != words.size for plane in planes):
        raise ValueError("every plane holds one byte per element")
    _MERGE[words.itemsize](*planes, words, rotate)


def constant(x: Array) -> int:
    """The value of every byte (uint8, flat, not empty) if they are all the same, else -1."""
    return int(_constant(x))
