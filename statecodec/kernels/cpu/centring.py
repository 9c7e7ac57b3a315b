"""Centring for CPUs; the arithmetic is that of `reference.centring`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statecodec.kernels.cpu.views import Memory, array_of, kernel


def centre(plane: Memory, columns: Memory, lines: Memory, residual: Memory, *, nibbles: bool) -> None:
    """See `reference.centring.centre`."""
    arrays = (array_of(plane), array_of(columns), array_of(lines), array_of(residual))
    (_centre_nibbles if nibbles else _centre)(*arrays)


def uncentre(residual: Memory, columns: Memory, lines: Memory, plane: Memory, *, nibbles: bool) -> None:
    """See `reference.centring.uncentre`."""
    arrays = (array_of(residual), array_of(columns), array_of(lines), array_of(plane))
    (_uncentre_nibbles if nibbles else _uncentre)(*arrays)


def byte_counts(plane: Memory) -> Tensor:
    """See `reference.centring.byte_counts`."""
    return torch.from_numpy(_byte_counts(array_of(plane).reshape(-1)))


@kernel
def _byte_counts(plane: NDArray[Any]) -> Any:
    # Four tables: equal neighbours would otherwise wait for one another's counter.
    counts = np.zeros((4, 256), np.int64)
    whole = plane.size // 4 * 4
    for i in range(0, whole, 4):
        counts[0, plane[i]] += 1
        counts[1, plane[i + 1]] += 1
        counts[2, plane[i + 2]] += 1
        counts[3, plane[i + 3]] += 1
    for i in range(whole, plane.size):
        counts[0, plane[i]] += 1
    for byte in range(256):  # not counts.sum(0), which takes seconds to compile
        counts[0, byte] += counts[1, byte] + counts[2, byte] + counts[3, byte]
    return counts[0]


@kernel
def _centre(plane: NDArray[Any], columns: NDArray[Any], lines: NDArray[Any], residual: NDArray[Any]) -> None:
    rows, cols = plane.shape
    sums = np.zeros(cols, np.int32)
    for i in range(rows):
        for j in range(cols):
            sums[j] += np.int32(plane[i, j])
    total = np.int64(0)
    for j in range(cols):
        mean = (2 * np.int64(sums[j]) + rows) // (2 * rows)
        columns[j] = np.uint8(mean)
        total += mean
    for i in range(rows):
        line = np.int32(0)
        for j in range(cols):
            line += np.int32(plane[i, j])
        mean = np.uint8(((2 * (np.int64(line) - total) + cols) // (2 * cols)) & 255)
        lines[i] = mean
        for j in range(cols):
            residual[i, j] = plane[i, j] - columns[j] - mean


@kernel
def _uncentre(residual: NDArray[Any], columns: NDArray[Any], lines: NDArray[Any], plane: NDArray[Any]) -> None:
    rows, cols = plane.shape
    for i in range(rows):
        mean = lines[i]
        for j in range(cols):
            plane[i, j] = residual[i, j] + columns[j] + mean


@kernel
def _centre_nibbles(plane: NDArray[Any], columns: NDArray[Any], lines: NDArray[Any], residual: NDArray[Any]) -> None:
    rows, cols = plane.shape
    low, high = np.zeros(cols, np.int32), np.zeros(cols, np.int32)
    for i in range(rows):
        for j in range(cols):
            low[j] += np.int32(plane[i, j] & 15)
            high[j] += np.int32(plane[i, j] >> 4)
    total = np.int64(0)
    for j in range(cols):
        first = (2 * np.int64(low[j]) + rows) // (2 * rows)
        second = (2 * np.int64(high[j]) + rows) // (2 * rows)
        columns[j] = np.uint8(first | second << 4)
        total += first + second
    for i in range(rows):
        line = np.int32(0)
        for j in range(cols):
            line += np.int32(plane[i, j] & 15) + np.int32(plane[i, j] >> 4)
        mean = np.uint8(((2 * (np.int64(line) - total) + 2 * cols) // (4 * cols)) & 15)
        lines[i] = mean
        for j in range(cols):
            first = (plane[i, j] & np.uint8(15)) - (columns[j] & np.uint8(15)) - mean
            second = (plane[i, j] >> np.uint8(4)) - (columns[j] >> np.uint8(4)) - mean
            residual[i, j] = (first & np.uint8(15)) | ((second & np.uint8(15)) << np.uint8(4))


@kernel
def _uncentre_nibbles(residual: NDArray[Any], columns: NDArray[Any], lines: NDArray[Any], plane: NDArray[Any]) -> None:
    rows, cols = plane.shape
    for i in range(rows):
        mean = lines[i]
        for j in range(cols):
            first = (residual[i, j] & np.uint8(15)) + (columns[j] & np.uint8(15)) + mean
            second = (residual[i, j] >> np.uint8(4)) + (columns[j] >> np.uint8(4)) + mean
            plane[i, j] = (first & np.uint8(15)) | ((second & np.uint8(15)) << np.uint8(4))
