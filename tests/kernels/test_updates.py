"""Sums over Adam updates: the CPU's kernels beside the reference, and both beside numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statecodec import kernels

SETTINGS = {"correction1": 0.4, "correction2": 0.1, "eps": 1e-8}
NUMBERS = st.sampled_from([0.0, -0.0, 1e-3, -2e-3, 5e-9, -5e-9, 1e4, float("nan"), float("inf")])
ROOTS = st.sampled_from([0.0, 1e-6, 3e-5, 4.0, float("nan"), float("inf")])
ROWS = st.lists(st.tuples(NUMBERS, ROOTS, NUMBERS, ROOTS), min_size=1, max_size=600)


def directions(m: np.ndarray, v: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return (m / SETTINGS["correction1"]) / (np.sqrt(v / SETTINGS["correction2"]) + SETTINGS["eps"])


def expected(a: np.ndarray, v: np.ndarray, b: np.ndarray, w: np.ndarray) -> dict[str, Any]:
    """By the definition: an update of m / eps, where v is 0, counts in the difference alone."""
    x, y = directions(a, v), directions(b, w)
    finite = np.isfinite(x) & np.isfinite(y)
    difference = y[finite] - x[finite]
    counted = finite & ((v > 0) | (np.abs(x) < 1))
    p, q = x[counted], y[counted]
    return {
        "sum_sq": (p**2).sum(),
        "sum_sq_other": (q**2).sum(),
        "sum_sq_diff": (difference**2).sum(),
        "dot": (p * q).sum(),
        "max_abs": np.abs(p).max(initial=0.0),
        "max_abs_other": np.abs(q).max(initial=0.0),
        "nonfinite": (~finite).sum(),
    }


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@given(
    rows=st.lists(st.tuples(NUMBERS, ROOTS, NUMBERS, ROOTS), min_size=1, max_size=600), repeat=st.sampled_from([1, 40])
)
def test_sums_of_two_updates(backend: str, rows: list[tuple[float, ...]], repeat: int) -> None:
    columns = np.tile(np.array(rows, np.float32), (repeat, 1)).T.copy()
    found = kernels.get(backend).compare_updates(*map(torch.from_numpy, columns), **SETTINGS)
    sums = expected(*columns.astype(np.float64))
    assert found.nonfinite == sums.pop("nonfinite")
    rounded = 1e-6 * (sums["sum_sq"] + sums["sum_sq_other"])  # of numbers that are nearly the same, in fp32
    for name, value in sums.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5, abs=rounded), name
