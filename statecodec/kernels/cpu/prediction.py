"""Predictions of codes for CPUs; the arithmetic of `add_prediction` is exact, that of the search is not to the bit.

fp32 holds every partial sum of a prediction, so its products vectorise, in any order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statecodec.kernels.cpu.views import Memory, array_of, kernel, summing_kernel
from statecodec.kernels.factors import ABSENT, Array, Factors, Matrix, Passes, find

_TILE = 512  # columns: so much of all factors stays in the first-level cache
_EIGHT = 8  # components or vectors that share a loop
_ROWS = 16  # rows for which so many vectors stay in the cache
_LENGTH = 256  # of vectors that are summed up at once
_PRECISION, _SWEEPS = 1e-13, 30  # of the whole energy beside the diagonal; sweeps that are enough for anything
_ZERO, _HALF = np.float32(0.0), np.float32(0.5)


def factors_of(codes: Memory) -> Factors | None:
    """See `reference.prediction.factors_of`."""
    return find(array_of(codes), Passes(project, mix, orthonormal, principal, combine))


def add_prediction(codes: Memory, factors: Factors, *, sign: int) -> None:
    """See `reference.prediction.add_prediction`."""
    left, right = np.ascontiguousarray(_padded(factors.left).T), _padded(factors.right)
    _add_prediction(array_of(codes), left, right, np.float32(2.0**-factors.shift), np.int32(sign))


def project(matrix: Matrix, basis: Array, step: int) -> tuple[Array, float]:
    """See `reference.prediction.project`."""
    padded = _padded(basis)
    out = np.empty((len(padded), -(-len(matrix.codes) // step)), np.float32)
    energy = _project(matrix.codes, matrix.means, np.float32(matrix.most), padded, step, out)
    return out[: len(basis)], energy


def mix(matrix: Matrix, weights: Array, step: int) -> Array:
    """See `reference.prediction.mix`."""
    out = np.zeros((len(weights), matrix.codes.shape[1]), np.float32)
    padded = np.ascontiguousarray(_padded(weights.T).T)
    _mix(matrix.codes, matrix.means, np.float32(matrix.most), padded, weights.shape[1], step, out)
    return out


def orthonormal(vectors: Array) -> Array:
    """See `reference.prediction.orthonormal`."""
    basis = vectors.astype(np.float64, order="C")
    _orthonormalise(basis)
    return basis.astype(np.float32)


def principal(vectors: Array) -> tuple[Array, Array]:
    """See `reference.prediction.principal`."""
    products, turn = np.empty((len(vectors), len(vectors)), np.float64), np.eye(len(vectors))
    _gram(np.ascontiguousarray(vectors), products)
    _diagonalise(products, turn)
    squares = np.diag(products)
    order = np.argsort(-squares)
    return squares[order], turn[order]


def combine(weights: Array, vectors: Array) -> Array:
    """See `reference.prediction.combine`."""
    out = np.empty((len(weights), vectors.shape[1]), np.float32)
    padded = np.zeros((len(weights), -(-len(vectors) // _EIGHT) * _EIGHT), np.float64)
    padded[:, : len(vectors)] = weights
    _combine(padded, np.ascontiguousarray(vectors), out)
    return out


def _padded(factor: Array) -> Array:
    """In fp32, with rows of zeros up to a multiple of _EIGHT."""
    padded = np.zeros((-(-len(factor) // _EIGHT) * _EIGHT, factor.shape[1]), np.float32)
    padded[: len(factor)] = factor
    return padded


@kernel
def _add_prediction(codes: NDArray[Any], left: NDArray[Any], right: NDArray[Any], scale: Any, sign: Any) -> None:
    rows, cols = codes.shape
    total, whole = np.empty(_TILE, np.float32), np.empty(_TILE, np.int32)
    tile = np.empty((right.shape[0], _TILE), np.float32)
    for start in range(0, cols, _TILE):
        stop = min(start + _TILE, cols)
        width = stop - start
        tile[:, :width] = right[:, start:stop]
        for row in range(rows):
            total[:width] = _ZERO
            for k in range(0, right.shape[0], _EIGHT):
                _add_eight(total[:width], left[row, k : k + _EIGHT], tile[k : k + _EIGHT])
            _round(total[:width], scale, sign, whole)
            _add(codes[row, start:stop], whole)


@kernel
def _add_eight(total: NDArray[Any], left: NDArray[Any], right: NDArray[Any]) -> None:
    a, b, c, d, e, f, g, h = left[0], left[1], left[2], left[3], left[4], left[5], left[6], left[7]
    for j in range(total.size):
        first = (a * right[0, j] + b * right[1, j]) + (c * right[2, j] + d * right[3, j])
        second = (e * right[4, j] + f * right[5, j]) + (g * right[6, j] + h * right[7, j])
        total[j] += first + second


@kernel
def _round(total: NDArray[Any], scale: Any, sign: Any, whole: NDArray[Any]) -> None:
    for j in range(total.size):
        exact = total[j] * scale + _HALF
        number = np.int32(exact)
        number -= np.int32(np.float32(number) > exact)  # down, also below zero
        whole[j] = sign * number


@kernel
def _add(codes: NDArray[Any], whole: NDArray[Any]) -> None:
    for j in range(codes.size):
        codes[j] += whole[j]


@kernel
def _project(
    codes: NDArray[Any], means: NDArray[Any], most: Any, basis: NDArray[Any], step: int, out: NDArray[Any]
) -> Any:
    values, energy = np.empty((_ROWS, codes.shape[1]), np.float32), 0.0
    for first in range(0, out.shape[1], _ROWS):
        few = min(_ROWS, out.shape[1] - first)
        for i in range(few):
            _load(codes[(first + i) * step], means, most, values[i])
            energy += _square(values[i])
        for at in range(0, basis.shape[0], _EIGHT):
            for i in range(few):
                _dot_eight(values[i], basis[at : at + _EIGHT], out[at : at + _EIGHT, first + i])
    return energy


@kernel
def _mix(
    codes: NDArray[Any], means: NDArray[Any], most: Any, weights: NDArray[Any], count: int, step: int,
    out: NDArray[Any],
) -> None:  # fmt: skip
    values = np.zeros((_EIGHT, codes.shape[1]), np.float32)
    for first in range(0, count, _EIGHT):
        for i in range(min(_EIGHT, count - first)):
            _load(codes[(first + i) * step], means, most, values[i])
        for k in range(out.shape[0]):
            _add_eight(out[k], weights[k, first : first + _EIGHT], values)


@kernel
def _gram(vectors: NDArray[Any], out: NDArray[Any]) -> None:
    for i in range(vectors.shape[0]):
        for j in range(i + 1):
            out[i, j] = out[j, i] = _dot(vectors[i], vectors[j])


@summing_kernel
def _dot(a: NDArray[Any], b: NDArray[Any]) -> Any:
    total = 0.0
    for j in range(a.size):
        total += np.float64(a[j]) * np.float64(b[j])
    return total


@kernel
def _orthonormalise(basis: NDArray[Any]) -> None:
    for i in range(basis.shape[0]):
        before = _dot(basis[i], basis[i])
        for j in range(i):
            _add_scaled(basis[i], -_dot(basis[i], basis[j]), basis[j])
        square = _dot(basis[i], basis[i])
        basis[i] *= 1 / math.sqrt(square) if square > ABSENT * ABSENT * before else 0.0


@kernel
def _add_scaled(a: NDArray[Any], scale: Any, b: NDArray[Any]) -> None:
    for j in range(a.size):
        a[j] += scale * b[j]


@kernel
def _diagonalise(symmetric: NDArray[Any], turn: NDArray[Any]) -> None:
    """Jacobi's rotations, applied to the rows of `turn` as well, until next to nothing is beside the diagonal."""
    n, least = symmetric.shape[0], 0.0
    for i in range(n):
        least += symmetric[i, i] * _PRECISION
    turned = True
    for _ in range(_SWEEPS):
        if not turned:
            return
        turned = False
        for p in range(n):
            for q in range(p + 1, n):
                if abs(symmetric[p, q]) > least:
                    turned = True
                    half = (symmetric[q, q] - symmetric[p, p]) / (2 * symmetric[p, q])
                    tangent = (1.0 if half >= 0 else -1.0) / (abs(half) + math.sqrt(half * half + 1))
                    cosine = 1 / math.sqrt(tangent * tangent + 1)
                    _rotate(symmetric[p], symmetric[q], cosine, tangent * cosine)
                    _rotate(symmetric[:, p], symmetric[:, q], cosine, tangent * cosine)
                    _rotate(turn[p], turn[q], cosine, tangent * cosine)


@kernel
def _rotate(a: NDArray[Any], b: NDArray[Any], cosine: Any, sine: Any) -> None:
    for j in range(a.size):
        a[j], b[j] = cosine * a[j] - sine * b[j], sine * a[j] + cosine * b[j]


@kernel
def _combine(weights: NDArray[Any], vectors: NDArray[Any], out: NDArray[Any]) -> None:
    wide, total = np.zeros((weights.shape[1], _LENGTH), np.float64), np.empty(_LENGTH, np.float64)
    for start in range(0, vectors.shape[1], _LENGTH):
        stop = min(start + _LENGTH, vectors.shape[1])
        wide[: vectors.shape[0], : stop - start] = vectors[:, start:stop]
        for i in range(weights.shape[0]):
            total[:] = 0.0
            for k in range(0, weights.shape[1], _EIGHT):
                _add_eight(total, weights[i, k : k + _EIGHT], wide[k : k + _EIGHT])
            out[i, start:stop] = total[: stop - start]


@kernel
def _load(codes: NDArray[Any], means: NDArray[Any], most: Any, values: NDArray[Any]) -> None:
    """A row's values as the search sees them."""
    mean = _ZERO
    if means.size:
        for j in range(codes.size):
            values[j] = np.float32(codes[j]) - means[j] if codes[j] else _ZERO
        mean = _mean(values, codes)
    else:
        for j in range(codes.size):
            values[j] = np.float32(codes[j])
    for j in range(codes.size):
        values[j] = min(max(values[j] - mean, -most), most) if codes[j] else _ZERO


@summing_kernel
def _mean(values: NDArray[Any], codes: NDArray[Any]) -> Any:
    total, count = _ZERO, np.int32(0)
    for j in range(values.size):
        total += values[j]
        count += np.int32(codes[j] != 0)
    return total / np.float32(count) if count else _ZERO


@summing_kernel
def _square(values: NDArray[Any]) -> Any:
    total = _ZERO
    for j in range(values.size):
        total += values[j] * values[j]
    return total


@summing_kernel
def _dot_eight(values: NDArray[Any], basis: NDArray[Any], out: NDArray[Any]) -> None:
    a, b, c, d, e, f, g, h = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
    for j in range(values.size):
        value = values[j]
        a += value * basis[0, j]
        b += value * basis[1, j]
        c += value * basis[2, j]
        d += value * basis[3, j]
        e += value * basis[4, j]
        f += value * basis[5, j]
        g += value * basis[6, j]
        h += value * basis[7, j]
    out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7] = a, b, c, d, e, f, g, h
