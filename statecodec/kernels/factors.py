"""The low-rank part of a matrix of codes, as integers: the search that every backend shares.

First moments, and second moments after their row and column terms, are close to a sum of a few outer products. A
prediction from integer factors is the same number on every machine, so what is left after it can be stored in its
place without a loss. The factors are found by a random sketch of some rows and one power iteration on them, and are
as coarse as the rest allows: their rounding adds to every code about as much as one more bit for each of them would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

RANK: Final = 24  # components at most
MOST_RANK: Final = 64  # that a file may have
RANGE: Final = 1 << 23  # of a prediction before it is shifted: with a half below 2**24, so fp32 sums are exact
MOST_SHIFT: Final = 23
SMALLEST: Final = 48  # rows and columns
FEWEST: Final = 1 << 15  # codes: of fewer the search takes too long for what it saves
WORTH: Final = 0.1  # bits a code that must be saved: less is not worth the time

_SKETCH = 32  # vectors of a sketch: the components and a few more
_SAMPLED = 192  # rows of a sketch: so many, evenly spaced, and less than twice as many
_FEW = 64  # rows that means and scale are taken from
_OUTLIER = 8.0  # mean magnitudes from which a code counts as no more
_LARGEST = 2.0**20  # beyond it products of three sums would leave fp32's range
_GRID = 1 / 12  # variance of a rounding
ABSENT: Final = 1e-6  # of a vector's length: what is no longer after others are taken out is rounding, not a direction


@dataclass(frozen=True)
class Factors:
    """A prediction: the sum over k of left[k, i] * right[k, j], divided by 2**shift and rounded half up.

    Args:
        left: int16 (rank, rows).
        right: int16 (rank, columns).
        shift: 0 to MOST_SHIFT.
    """

    left: Array
    right: Array
    shift: int

    @property
    def in_range(self) -> bool:
        """Whether sums of fp32 products are exact in any order."""
        most = [np.abs(factor.astype(np.float64)).max(axis=1, initial=0) for factor in (self.left, self.right)]
        return bool(most[0] @ most[1] < RANGE)


@dataclass(frozen=True)
class Matrix:
    """Codes as the search sees them: `value` of code c in column j is c - means[j], kept within `most`.

    With means, codes of 0 have the value 0 whatever the mean, and a row's other values are less their own mean.

    Args:
        codes: int16 or int32 (rows, columns).
        means: fp32, one a column, or none at all.
        most: The largest magnitude of a value.
    """

    codes: Array
    means: Array
    most: float


class Passes(NamedTuple):
    """The passes over codes and vectors that a backend makes for the search: see `reference.prediction`.

    LAPACK's and BLAS's would be divided among threads of their own, which wait for each other far longer than work of
    this size takes.
    """

    project: Callable[[Matrix, Array, int], tuple[Array, float]]
    mix: Callable[[Matrix, Array, int], Array]
    orthonormal: Callable[[Array], Array]
    principal: Callable[[Array], tuple[Array, Array]]
    combine: Callable[[Array, Array], Array]


def find(codes: Array, passes: Passes) -> Factors | None:
    """The factors that are worth taking out of a matrix of codes.

    Args:
        codes: int16 (log codes, whose row and column means are left to the terms of narrowing) or int32.
        passes: Those of the backend.

    Returns:
        The factors; None if they would save less than WORTH bits a code.
    """
    rows, cols = codes.shape
    if min(rows, cols) < SMALLEST or codes.size < FEWEST:
        return None
    matrix, mean = _matrix(codes)
    every = max(rows // _SAMPLED, 1)
    sketch = passes.mix(matrix, _signs()[:, : -(-rows // every)], every)
    sampled, _ = passes.project(matrix, sketch, every)
    basis = passes.orthonormal(passes.mix(matrix, sampled, every))
    left, energy = passes.project(matrix, basis, 1)
    squares, turn = passes.principal(left)
    rank, rest = _rank(np.maximum(squares[:RANK], 0.0), energy, mean, rows, cols)
    if not rank:
        return None
    turn, sizes = turn[:rank], np.sqrt(squares[:rank])
    return _rounded(passes.combine(turn, left), passes.combine(turn, basis), sizes, rest)


def _matrix(codes: Array) -> tuple[Matrix, float]:
    """Means and scale from some of the rows, and the mean of all values."""
    sample = codes[:: -(-len(codes) // _FEW)].astype(np.float32)
    means = np.empty(0, np.float32)
    if codes.itemsize == 2:
        there = sample != 0
        means = sample.sum(0) / np.maximum(there.sum(0, dtype=np.float32), 1.0)
        sample = np.where(there, sample - means, 0.0)
        sample -= np.where(there, sample.mean(1, keepdims=True), 0.0)
    most = min(max(_OUTLIER * float(np.abs(sample).mean()), _OUTLIER), _LARGEST)
    return Matrix(codes, means, most), float(np.clip(sample, -most, most).mean())


@cache
def _signs() -> Array:
    signs: Array = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (_SKETCH, 2 * _SAMPLED))
    return signs


def _rank(squares: Array, energy: float, mean: float, rows: int, cols: int) -> tuple[int, float]:
    """How many components save the most bits, each less its own, and the rms that is left; 0 if it is too little.

    That codes are around a mean, as what changed since a base is, costs no bits, and taking it out saves none.
    """
    n, ranks = rows * cols, np.arange(1, len(squares) + 1)
    rest = np.maximum(energy - np.cumsum(squares), 0.0) / n + _GRID
    after = rest * (1 + ranks * (1 / rows + 1 / cols))  # with what rounding the factors adds
    sizes = squares / (12 * rest)
    bits = np.cumsum(_entropy(sizes / rows) * rows + _entropy(sizes / cols) * cols)
    before = max(energy / n - mean**2, 0.0) + _GRID
    saved = 0.5 * np.log2(before / after) - bits / n
    best = int(saved.argmax())
    return (best + 1 if saved[best] > WORTH else 0), math.sqrt(rest[best])


def _entropy(variance: Array) -> Array:
    """About how many bits a normally distributed number takes, rounded to an integer."""
    bits: Array = 0.5 * np.log2(2 * math.pi * math.e * (variance + _GRID))
    return bits


def _rounded(left: Array, right: Array, sizes: Array, rest: float) -> Factors | None:
    """Integer factors.

    `sizes` are the singular values. The steps are so wide that the rounding of one factor of one component is an error
    of rms `rest`, divided by the root of how many codes share the factor.
    """
    coarse = math.sqrt(12) * rest
    product = coarse**2 / sizes  # of the steps of both factors
    shift = min(max(math.ceil(-float(np.log2(product).mean())), 0), MOST_SHIFT)
    balance = np.sqrt(product * 2.0**shift)  # the product of both steps has to be 2**-shift for every component
    whole = [np.rint(left / (coarse / balance)[:, None]), np.rint(right / (coarse / sizes / balance)[:, None])]
    if max(float(np.abs(factor).max()) for factor in whole) > np.iinfo(np.int16).max:
        return None
    factors = Factors(whole[0].astype(np.int16, order="C"), whole[1].astype(np.int16, order="C"), shift)
    return factors if factors.in_range else None
