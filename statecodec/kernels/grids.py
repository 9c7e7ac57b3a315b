"""The grids of `uniform`, `direction` and `logarithmic`: the numbers that every backend shares.

A linear grid numbers every finite fp32 value. A magnitude below LIMIT cells, each a step wide, is rounded to a
multiple of the step; from there on its own bits go on counting, so that an outlier of any size is exact and order is
kept:

    magnitude < LIMIT * step     code = round(magnitude / step)
    otherwise                    code = LIMIT + bits(magnitude) - bits(LIMIT * step)

A logarithmic grid has `per_octave` codes per octave from the smallest subnormal of fp32 to its largest value, and code
0 for zero alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

LIMIT = 1 << 22  # up to here fp32 represents halves, so rounding half up is exact
LARGEST_BITS = 0x7F7FFFFF  # of the largest finite fp32
MIN_STEP, MAX_STEP = 2.0**-126, 2.0**100  # the step and its reciprocal are normal, LIMIT cells are finite
LOWEST = -149  # exponent of the smallest subnormal
OCTAVES = 277  # from there to 2**128
MAX_PER_OCTAVE = 64


@dataclass(frozen=True)
class Grid:
    """A linear grid. The step is used as rounded to fp32, and so is its reciprocal."""

    step: float

    @cached_property
    def width(self) -> float:
        """The step as used."""
        return float(np.float32(self.step))

    @cached_property
    def per_unit(self) -> float:
        """Its reciprocal as used."""
        return float(np.float32(1.0) / np.float32(self.step))

    @cached_property
    def threshold(self) -> int:
        """fp32 bits of LIMIT cells, from where values are exact."""
        return int(np.float32(LIMIT * np.float32(self.step)).view(np.int32))


@dataclass(frozen=True)
class LogGrid:
    """A logarithmic grid of so many codes per octave."""

    per_octave: int

    @property
    def top(self) -> int:
        """The largest code."""
        return 1 + OCTAVES * self.per_octave

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """The value of every code: 0, then 2 ** (LOWEST + (code - 1) / per_octave), at most the largest fp32."""
        exponent = LOWEST + np.arange(self.top, dtype=np.float64) / self.per_octave
        largest = float(np.finfo(np.float32).max)
        return np.concatenate([[0.0], np.minimum(np.exp2(exponent), largest)]).astype(np.float32)

    @cached_property
    def every_code(self) -> NDArray[np.float32]:
        """The value of every 16-bit number, unsigned: negative codes and those above the top decode as the grid's ends.

        Twice as fast as keeping each code within the table: only what codes there are is ever in the cache.
        """
        values = np.full(1 << 16, self.table[0], np.float32)
        values[: self.table.size] = self.table
        values[self.table.size : 1 << 15] = self.table[-1]
        return values
