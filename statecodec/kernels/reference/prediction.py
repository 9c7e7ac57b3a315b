"""Predicting a matrix of codes from integer factors, and the passes over it that find them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from statecodec.kernels.factors import Array, Factors, Matrix, find
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def factors_of(codes: Tensor) -> Factors | None:
    """The low-rank part of codes.

    Args:
        codes: int16 or int32, rows x cols, contiguous.

    Returns:
        The factors; None if taking them out saves too little.
    """
    return find(codes.cpu().numpy(), project, mix)


def add_prediction(codes: Tensor, factors: Factors, *, sign: int) -> None:
    """Add a prediction to codes, or subtract it, modulo 2**bits.

    Args:
        codes: int16 or int32, rows x cols; overwritten.
        factors: The prediction.
        sign: 1 or -1.
    """
    left, right = (torch.from_numpy(f).to(codes.device, torch.float64) for f in (factors.left, factors.right))
    total = (left.T @ right).to(torch.int64)  # exact, as sums of integers are in fp64
    half = (1 << factors.shift) >> 1
    # A conversion to fewer bits takes the lowest ones.
    codes.copy_((codes.to(torch.int64) + sign * ((total + half) >> factors.shift)).to(codes.dtype))


def project(matrix: Matrix, basis: Array, start: int, step: int) -> tuple[Array, float]:
    """Some rows times a basis.

    Args:
        matrix: The codes.
        basis: fp32 (vectors, columns).
        start: The first row.
        step: How far it is to the next one.

    Returns:
        fp32 (rows taken, vectors), and the sum of the squares of those rows.
    """
    rows = _values(matrix, start, step)
    return rows @ basis.T, float(np.square(rows, dtype=np.float64).sum())


def mix(matrix: Matrix, weights: Array, start: int, step: int) -> Array:
    """Sums of some rows.

    Args:
        matrix: The codes.
        weights: fp32 (rows taken, vectors).
        start: The first row.
        step: How far it is to the next one.

    Returns:
        fp32 (vectors, columns).
    """
    mixed: Array = weights.T @ _values(matrix, start, step)
    return mixed


def _values(matrix: Matrix, start: int, step: int) -> Array:
    codes = matrix.codes[start::step]
    values = codes.astype(np.float32)
    if matrix.means.size:
        there = codes != 0
        values = np.where(there, values - matrix.means, np.float32(0))
        mean = values.sum(1, keepdims=True) / np.maximum(there.sum(1, keepdims=True, dtype=np.float32), 1)
        values = np.where(there, values - mean, np.float32(0))
    kept: Array = np.clip(values, -np.float32(matrix.most), np.float32(matrix.most))
    return kept
