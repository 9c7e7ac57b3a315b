"""Predicting a matrix of codes from integer factors, and the passes over it that find them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from statecodec.kernels.factors import ABSENT, Array, Factors, Matrix, Passes, find
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
    return find(codes.cpu().numpy(), Passes(project, mix, orthonormal, principal, combine))


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


def project(matrix: Matrix, basis: Array, step: int) -> tuple[Array, float]:
    """A basis times rows, transposed.

    Args:
        matrix: The codes.
        basis: fp32 (vectors, columns).
        step: How far it is from one row that is taken to the next one.

    Returns:
        fp32 (vectors, rows taken), and the sum of the squares of those rows.
    """
    rows = _values(matrix, step)
    return basis @ rows.T, float(np.square(rows, dtype=np.float64).sum())


def mix(matrix: Matrix, weights: Array, step: int) -> Array:
    """Sums of rows.

    Args:
        matrix: The codes.
        weights: fp32 (vectors, rows taken).
        step: How far it is from one row that is taken to the next one.

    Returns:
        fp32 (vectors, columns).
    """
    mixed: Array = weights @ _values(matrix, step)
    return mixed


def orthonormal(vectors: Array) -> Array:
    """Each vector without its part in those before it, to the length 1 (Gram and Schmidt), in fp64 and then rounded.

    Args:
        vectors: fp32 (vectors, length).

    Returns:
        fp32 (vectors, length); zeros where next to nothing is left.
    """
    basis = vectors.astype(np.float64)
    for i, vector in enumerate(basis):
        before = np.linalg.norm(vector)
        for other in basis[:i]:
            vector -= (vector @ other) * other
        length = np.linalg.norm(vector)
        vector *= 1 / length if length > ABSENT * before else 0.0
    return basis.astype(np.float32)


def principal(vectors: Array) -> tuple[Array, Array]:
    """The orthogonal sums of vectors that take most of their energy, most first.

    Args:
        vectors: fp32 (vectors, length).

    Returns:
        The energy of each sum, and its weights: fp64 (vectors,) and (sums, vectors).
    """
    wide = vectors.astype(np.float64)
    squares, turn = np.linalg.eigh(wide @ wide.T)
    return squares[::-1], turn.T[::-1]


def combine(weights: Array, vectors: Array) -> Array:
    """Sums of vectors, in fp64 and then rounded.

    Args:
        weights: fp64 (sums, vectors).
        vectors: fp32 (vectors, length).

    Returns:
        fp32 (sums, length).
    """
    sums: Array = (weights @ vectors.astype(np.float64)).astype(np.float32)
    return sums


def _values(matrix: Matrix, step: int) -> Array:
    codes = matrix.codes[::step]
    values = codes.astype(np.float32)
    if matrix.means.size:
        there = codes != 0
        values = np.where(there, values - matrix.means, np.float32(0))
        mean = values.sum(1, keepdims=True) / np.maximum(there.sum(1, keepdims=True, dtype=np.float32), 1)
        values = np.where(there, values - mean, np.float32(0))
    kept: Array = np.clip(values, -np.float32(matrix.most), np.float32(matrix.most))
    return kept
