"""Companding curves: the tables that every backend shares.

A curve maps a magnitude r in [0, 1] (the value over its group's scale) to a code in 0..top. Decoding is one table
look-up and one fp32 multiplication, so it is bit-exact everywhere; the table is computed once, in float64.

    linear    y = r                      softsign  y = 2r / (1 + r)        (FlashOptim section 3.2, first moment)
    sqrt      y = sqrt(r)                log       y = 1 + log2(r) * per_octave / top

Encoding rounds y * top half up. For `log` it takes the octave from the exponent bits and log2 of the mantissa from
LOG2, a polynomial in separately rounded fp32 operations: backends agree to the bit although their log2 do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

LINEAR, SOFTSIGN, SQRT, LOG = range(4)
# Codes per octave of a logarithmic curve, by its bits: 16 and 8 octaves below the largest value.
DEFAULT_PER_OCTAVE = {8: 16, 4: 2}
KINDS = {"linear": LINEAR, "softsign": SOFTSIGN, "sqrt": SQRT, "log": LOG}

# log2(1 + f) = f * (c0 + f * (c1 + f * (c2 + f * c3))) for f in [0, 1), within 1.2e-4 octaves (Horner, no fused
# operations).
LOG2 = (1.438725471496582, -0.6777824759483337, 0.32118651270866394, -0.08212951570749283)


@dataclass(frozen=True)
class Curve:
    """One companding curve at one code width.

    `bits` is 8 or 4; a signed curve has codes -top..top, an unsigned one 0..top and code 0 only for an exact zero.
    `per_octave` (log only): codes per octave. `limit` lowers the top code (0: as many as the bits allow): fewer levels,
    which packing turns into fewer bits.
    """

    name: str
    bits: int
    signed: bool
    per_octave: int = 16
    limit: int = 0

    @property
    def kind(self) -> int:
        """The curve's number in kernels: LINEAR, SOFTSIGN, SQRT or LOG."""
        return KINDS[self.name]

    @property
    def top(self) -> int:
        """The largest code: `limit`, or 127 / 7 signed, 255 / 15 unsigned."""
        return self.limit or (2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1)

    @cached_property
    def levels(self) -> NDArray[np.float32]:
        """Decoded magnitude of the codes 0..top, fp32, levels[0] == 0 and levels[top] == 1."""
        code = np.arange(self.top + 1, dtype=np.float64)
        y = code / self.top
        if self.kind == LINEAR:
            r = y
        elif self.kind == SOFTSIGN:
            r = y / (2 - y)
        elif self.kind == SQRT:
            r = y * y
        else:
            r = np.where(code == 0, 0.0, np.exp2((code - self.top) / self.per_octave))
        return r.astype(np.float32)

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """Decoded value over scale for every byte (8 bits) or nibble (4 bits), indexed by the unsigned code."""
        if not self.signed:
            # A damaged code above the top decodes as the top: the table covers every byte.
            return self.levels[np.minimum(np.arange(2**self.bits), self.top)]
        half = 2 ** (self.bits - 1)
        positive = self.levels[np.minimum(np.arange(half), self.top)]
        negative = -self.levels[np.minimum(np.arange(half, 0, -1), self.top)]
        return np.concatenate([positive, negative])

    @property
    def half_lowest(self) -> float:
        """Half of the lowest level: below it, a signed logarithmic curve rounds to 0."""
        return float(self.levels[1]) * 0.5

    @cached_property
    def min_scale(self) -> int:
        """bf16 bits of the smallest scale: a normal number, whose lowest level is a positive fp32 number."""
        needed = 2.0**-149 / float(self.levels[1])
        bits = max(int(np.float32(needed).view(np.uint32)) >> 16, 0x80)
        while np.float32(np.uint32(bits << 16).view(np.float32)) * self.levels[1] <= 0:
            bits += 1
        return bits
