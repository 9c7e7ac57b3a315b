"""Predictions: both backends add the same numbers, whatever the factors, and their factors are near the best ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statecodec.kernels import cpu, reference
from statecodec.kernels.factors import FEWEST, MOST_RANK, MOST_SHIFT, RANGE, SMALLEST, Factors

BACKENDS = (reference, cpu)


@settings(max_examples=60)
@given(
    dtype=st.sampled_from([torch.int16, torch.int32]),
    rank=st.integers(1, MOST_RANK),
    rows=st.integers(1, 40),
    cols=st.sampled_from([1, 3, 64, 511, 513, 1100]),
    shift=st.integers(0, MOST_SHIFT),
    sign=st.sampled_from([1, -1]),
    seed=st.integers(0, 9),
)
def test_backends_predict_the_same(
    dtype: torch.dtype, rank: int, rows: int, cols: int, shift: int, sign: int, seed: int
) -> None:
    """Up to the very end of the range, against integer arithmetic."""
    generator = np.random.default_rng(seed)
    most = int((RANGE - 1) / rank) ** 0.5
    left, right = (generator.uniform(-most, most, (rank, n)).astype(np.int16) for n in (rows, cols))
    left[:, 0] = right[:, 0] = int(most)  # the largest sum
    factors = Factors(left, right, shift)
    assert factors.in_range
    codes = torch.from_numpy(generator.integers(torch.iinfo(dtype).min, torch.iinfo(dtype).max, (rows, cols))).to(dtype)
    total = left.T.astype(np.int64) @ right.astype(np.int64)
    expected = codes.numpy().astype(np.int64) + sign * ((total + (1 << shift >> 1)) >> shift)
    for backend in BACKENDS:
        changed = codes.clone()
        backend.add_prediction(changed, factors, sign=sign)
        assert torch.equal(changed, torch.from_numpy(expected).to(dtype))
        backend.add_prediction(changed, factors, sign=-sign)
        assert torch.equal(changed, codes)


def test_factors_out_of_range_are_known() -> None:
    one = np.full((2, 3), 2048, np.int16)
    assert not Factors(one, one, 0).in_range  # 2 * 2**22
    assert Factors(one, one - 1, 0).in_range
    lowest = np.full((1, 3), -(2**15), np.int16)
    assert not Factors(lowest, lowest, 0).in_range


def low_rank(rows: int, cols: int, sizes: list[float], noise: float) -> torch.Tensor:
    """Codes of these singular values (times the root of rows * cols) and noise."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, len(sizes), generator=generator) for n in (rows, cols))
    return (left * torch.tensor(sizes)) @ right.T + noise * torch.randn(rows, cols, generator=generator)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize(("rows", "cols"), [(200, 300), (1000, 64), (64, 1000)])
def test_what_is_left_is_near_what_the_best_factors_leave(rows: int, cols: int, dtype: torch.dtype) -> None:
    """As the SVD has them, which every row of the matrix and no integer goes into."""
    sizes = [30.0, 20.0, 15.0, 10.0]
    codes = low_rank(rows, cols, sizes, 5.0).round()
    if dtype == torch.int16:  # log codes: beside terms of rows and columns
        generator = torch.Generator().manual_seed(2)
        codes += (
            100 * torch.randn(rows, 1, generator=generator) + 50 * torch.randn(1, cols, generator=generator)
        ).round()
        codes += 1000
    codes = codes.to(dtype)

    def left_over(x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return x if dtype == torch.int32 else x - x.mean(0) - x.mean(1, keepdim=True) + x.mean()

    singular = torch.linalg.svdvals(left_over(codes))
    best = float(singular[len(sizes) :].square().sum())
    for backend in BACKENDS:
        factors = backend.factors_of(codes)
        assert factors is not None
        assert len(sizes) <= len(factors.left) <= len(sizes) + 2
        rest = codes.clone()
        backend.add_prediction(rest, factors, sign=-1)
        rounding = 1 + len(factors.left) * (1 / rows + 1 / cols)
        assert float(left_over(rest).square().sum()) < 1.08 * rounding * best


@pytest.mark.parametrize("passes", [reference.prediction, cpu.prediction])
def test_a_basis_is_orthonormal_and_what_is_not_there_is_zero(passes: Any) -> None:
    """Vectors that are nearly the same, a multiple of another, and none at all among them."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((13, 700)).astype(np.float32)
    vectors[3] = vectors[2] + 1e-3 * vectors[3]
    vectors[7], vectors[9] = 3 * vectors[5], 0
    basis = passes.orthonormal(vectors).astype(np.float64)
    there = np.ones(13)
    there[[7, 9]] = 0
    assert np.abs(basis @ basis.T - np.diag(there)).max() < 1e-6
    left_out = vectors - (vectors @ basis.T) @ basis
    assert np.abs(left_out).max() < 1e-5


@pytest.mark.parametrize("passes", [reference.prediction, cpu.prediction])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_principal_sums_have_the_energies_that_numpy_finds(passes: Any, count: int) -> None:
    generator = np.random.default_rng(1)
    vectors = (generator.standard_normal((count, 500)) * np.logspace(0, -4, count)[:, None]).astype(np.float32)
    vectors[count // 2] = 0
    squares, turn = passes.principal(vectors)
    wide = vectors.astype(np.float64)
    expected = np.linalg.eigvalsh(wide @ wide.T)[::-1]
    assert np.allclose(squares, expected, rtol=1e-6, atol=1e-12 * expected[0])
    assert np.allclose(turn @ turn.T, np.eye(count))
    sums = passes.combine(turn, vectors)
    assert np.allclose(sums, turn @ wide, atol=1e-6)
    assert np.allclose(np.square(sums, dtype=np.float64).sum(1), expected, rtol=1e-4, atol=1e-9)


def test_the_search_on_a_cpu_wakes_no_threads_of_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = low_rank(200, 300, [30.0, 20.0], 3.0).round().to(torch.int32)
    for name in ("eigh", "eigvalsh", "qr", "svd", "solve", "norm"):
        monkeypatch.setattr(np.linalg, name, None)
    assert cpu.factors_of(codes) is not None


def test_rows_and_columns_of_zeros_stay_zero() -> None:
    codes = (low_rank(200, 300, [30.0, 20.0], 3.0).round() + 1000).to(torch.int16)
    codes[::3], codes[:, ::5] = 0, 0
    for backend in BACKENDS:
        factors = backend.factors_of(codes)
        assert factors is not None
        assert not factors.left[:, ::3].any()
        assert not factors.right[:, ::5].any()


@pytest.mark.parametrize(
    "codes",
    [
        low_rank(300, 300, [], 30.0),
        low_rank(300, 300, [], 30.0).abs(),  # their mean is a component, and no gain
        torch.zeros(300, 300),
        low_rank(SMALLEST - 1, 900, [30.0], 3.0),
        low_rank(100, (FEWEST - 1) // 100, [30.0], 3.0),
        torch.full((300, 300), -(2.0**31)),
        torch.eye(300) * 2.0**30,
    ],
)
def test_what_is_not_worth_it_has_no_factors(codes: torch.Tensor) -> None:
    for backend in BACKENDS:
        assert backend.factors_of(codes.round().to(torch.int32)) is None
