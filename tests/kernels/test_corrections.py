"""Codes come out right although division and roots start from approximations: emulated, with those a few ulps off.

What a GPU computes is followed here in wider numbers, rounded
to fp32 after every operation, around every threshold between two codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ULPS = (-2, -1, 0, 1, 2)
AROUND = 2000  # neighbours of every threshold on either side


def fma(a: Floats, b: Floats, c: Floats | float) -> Floats:
    wide = np.longdouble
    return np.asarray(a.astype(wide) * b.astype(wide) + np.asarray(c, wide), np.float32)


def off(exact: Any, ulps: int) -> Floats:
    """What an instruction returns that is not quite right."""
    return (np.asarray(exact, np.float32).view(np.int32) + np.int32(ulps)).view(np.float32)


def reciprocal(x: Floats, ulps: int) -> Floats:
    """`words.rounded_reciprocal`."""
    y = off(1.0 / x.astype(np.float64), ulps)
    return fma(fma(-x, y, 1.0), y, y)


def quotient(x: Floats, d: Floats, y: Floats) -> Floats:
    """`words.quotient`."""
    q = x * y
    return fma(fma(-q, d, x), y, q)


def root(x: Floats, ulps: int) -> Floats:
    """`words.root`."""
    y = off(1.0 / np.sqrt((x + np.float32(2.0**-126)).astype(np.float64)), ulps)
    s = x * y
    return fma(fma(-s, s, x), np.float32(0.5) * y, s)


def around(thresholds: NDArray[np.float64]) -> Floats:
    """fp32 numbers near these, up to 1, and some from everywhere."""
    near = thresholds.astype(np.float32).view(np.int32)[:, None] + np.arange(-AROUND, AROUND, dtype=np.int32)
    some = np.random.default_rng(0).random(1 << 18, np.float32)
    found = np.concatenate([near.reshape(-1).view(np.float32), some, some * np.float32(2.0**-30)])
    return found[(found >= 0) & (found <= 1)]


def codes(y: Floats, top: int) -> NDArray[np.int32]:
    return (y * np.float32(top) + np.float32(0.5)).astype(np.int32)


@pytest.mark.parametrize("top", [127, 7, 255, 15])
def test_codes(top: int) -> None:
    half = (np.arange(1, top + 1) - 0.5) / top
    r = around(half / (2 - half))
    above = np.float32(1) + r
    exact = codes((r + r) / above, top)
    for ulps in ULPS[1:-1]:
        assert np.array_equal(codes(quotient(r + r, above, reciprocal(above, ulps)), top), exact)
    r = around(half**2)
    exact = codes(np.sqrt(r), top)
    for ulps in ULPS:
        assert np.array_equal(codes(root(r, ulps), top), exact)


def test_reciprocals_of_scales() -> None:
    """Every bf16 number in [1, 2): a scale after its power of two has been taken out."""
    scale = (np.arange(0x3F80, 0x4000, dtype=np.int32) << 16).view(np.float32)
    for ulps in ULPS:
        assert np.array_equal(reciprocal(scale, ulps), np.float32(1) / scale)
