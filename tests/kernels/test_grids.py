"""The linear and the logarithmic grid: every backend writes the bits of the reference, and they are the nearest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from statecodec import kernels
from statecodec.kernels import INF, NAN, NEGATIVE
from statecodec.kernels.grids import LIMIT, MAX_STEP, MIN_STEP, Grid, LogGrid

# Triton's interpreter computes with numpy, which warns of overflow where IEEE 754 says what it gives.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

NAMES = ("reference", "cpu", "triton")
STEPS = [1.0, 1e-3, 3e-9, 1e-38, MIN_STEP, MAX_STEP]
SIZES = [1, 7, 4096, 4099, 140_001]
EXTREMES = [
    0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 5.9e-39, 3.4028235e38, -3.4028235e38, 1.0, -1.0, 0.5, 1.5, -2.5, 1e-30,
    1e30, 2.0**22, 2.0**22 - 0.5, 2.0**22 + 1, -(2.0**23), 16777217.0,
]  # fmt: skip
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def hard(n: int, seed: int = 0) -> Tensor:
    """Magnitudes over the whole fp32 range, a stretch of zeros, the extremes in between."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp(torch.randn(n, generator=generator) * 25)
    x = x.nan_to_num(posinf=3e38, neginf=-3e38)
    x[n // 2 : n // 2 + n // 9] = 0.0
    few = torch.tensor(EXTREMES)[:n]
    x[: len(few)] = few
    return x


def run(name: str, function: str, *tensors: Tensor, out: torch.dtype, device: torch.device, **how: Any) -> Any:
    """(output, what the kernel returned)."""
    place = device if name == "triton" else torch.device("cpu")
    moved = [t.to(place) for t in tensors]
    target = torch.full(moved[0].shape, 77, dtype=out, device=place)
    returned = getattr(kernels.get(name), function)(*moved, target, **how)
    return target.cpu(), returned


def agree(first: Any, other: Any) -> None:
    """Flags alike, and error sums to seven digits."""
    assert first[0] == other[0]
    assert first[1][:3] == pytest.approx(other[1][:3], rel=1e-7)
    assert first[1].mismatched == other[1].mismatched == 0


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("step", STEPS)
def test_uniform_backends_agree(step: float, n: int, device, same_bits) -> None:
    x, grid = hard(n), Grid(step)
    codes, made = run("reference", "encode_uniform", x, out=torch.int32, device=device, grid=grid)
    values, _ = run("reference", "decode_uniform", codes, out=torch.float32, device=device, grid=grid)
    assert made[0] == 0
    assert values.isfinite().all()
    agree(made, (0, kernels.get("reference").compare(x, values)))
    for name in ("cpu", "triton"):
        found, sums = run(name, "encode_uniform", x, out=torch.int32, device=device, grid=grid)
        assert same_bits(found, codes)
        agree(sums, made)
        again, _ = run(name, "decode_uniform", codes, out=torch.float32, device=device, grid=grid)
        assert same_bits(again, values)


@pytest.mark.parametrize("eps", [1e-8, MIN_STEP, 1.0])
@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-30])
def test_direction_backends_agree(step: float, eps: float, device, same_bits) -> None:
    m = hard(9001).clamp(-1e18, 1e18)
    v = (hard(9001, seed=1).clamp(-1e18, 1e18) / 1e3).square()
    v[::11] = 0.0
    m[(m / (v.double().sqrt() + eps)).abs() > 1e38] = 0.0  # a direction beyond fp32 is refused
    how = {"grid": Grid(step), "eps": float(np.float32(eps)), "device": device}
    codes, made = run("reference", "encode_direction", m, v, out=torch.int32, **how)
    values, _ = run("reference", "decode_direction", codes, v, out=torch.float32, **how)
    assert made[0] == 0
    for name in ("cpu", "triton"):
        found, sums = run(name, "encode_direction", m, v, out=torch.int32, **how)
        assert same_bits(found, codes)
        agree(sums, made)
        again, _ = run(name, "decode_direction", codes, v, out=torch.float32, **how)
        assert same_bits(again, values)
    u = m.double() / (v.double().sqrt() + eps)
    assert made[1].sum_sq == pytest.approx(float((u * u).sum()), rel=1e-5)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("per_octave", [1, 3, 8, 64])
def test_logarithmic_backends_agree(per_octave: int, n: int, device, same_bits) -> None:
    x, grid = hard(n).abs(), LogGrid(per_octave)
    x[0] = -0.0
    codes, made = run("reference", "encode_logarithmic", x, out=torch.int16, device=device, grid=grid)
    values, _ = run("reference", "decode_logarithmic", codes, out=torch.float32, device=device, grid=grid)
    assert bool(((values > 0) == (x > 0)).all())
    agree(made, (0, kernels.get("reference").compare(x, values)))
    for name in ("cpu", "triton"):
        found, sums = run(name, "encode_logarithmic", x, out=torch.int16, device=device, grid=grid)
        assert same_bits(found, codes)
        agree(sums, made)
        again, _ = run(name, "decode_logarithmic", codes, out=torch.float32, device=device, grid=grid)
        assert same_bits(again, values)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(few=st.lists(FINITE, min_size=1, max_size=20), step=st.floats(MIN_STEP, MAX_STEP), per_octave=st.integers(1, 64))
def test_any_values_are_numbered_to_the_nearest(
    few: list[float], step: float, per_octave: int, device, same_bits
) -> None:
    x, grid, log = torch.tensor(few), Grid(step), LogGrid(per_octave)
    exact = x.double()
    for name in NAMES:
        codes, _ = run(name, "encode_uniform", x, out=torch.int32, device=device, grid=grid)
        values, _ = run(name, "decode_uniform", codes, out=torch.float32, device=device, grid=grid)
        far = exact.abs() >= grid.width * LIMIT
        assert same_bits(values[far], x[far])
        slack = exact.abs() * 2.0**-22 + 2.0**-149
        assert bool(((values.double() - exact).abs() <= 0.5 * grid.width + slack).all())
        assert bool((values[x == 0] == 0).all())

        codes, _ = run(name, "encode_logarithmic", x.abs(), out=torch.int16, device=device, grid=log)
        ideal = 1 + (exact.abs().log2() + 149) * per_octave
        off = torch.where(x == 0, codes.double(), codes.double() - ideal)
        assert bool((off.abs() <= 0.5 + 2e-4 * per_octave).all())
        assert bool(((codes > 0) == (x != 0)).all())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    few=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20),
    step=st.floats(MIN_STEP, MAX_STEP),
    v=st.floats(0, width=32, allow_infinity=False),
)
def test_any_codes_decode_alike_to_finite_values(few: list[int], step: float, v: float, device, same_bits) -> None:
    codes, grid, log = torch.tensor(few, dtype=torch.int32), Grid(step), LogGrid(5)
    short = codes.view(torch.int16)
    second = torch.full(codes.shape, v)

    def decoded(name: str) -> list[Tensor]:
        how: dict[str, Any] = {"out": torch.float32, "device": device}
        return [
            run(name, "decode_uniform", codes, grid=grid, **how)[0],
            run(name, "decode_direction", codes, second, grid=grid, eps=1e-8, **how)[0],
            run(name, "decode_logarithmic", short, grid=log, **how)[0],
        ]

    expected = decoded("reference")
    assert all(bool(t.isfinite().all()) for t in expected)
    for name in ("cpu", "triton"):
        assert all(same_bits(a, b) for a, b in zip(decoded(name), expected, strict=True))


@pytest.mark.parametrize("step", [0.75, 1e-3, 3.1e-38])
def test_spans_without_exact_values_are_the_same(step: float, device, same_bits) -> None:
    """Up to the last number below the threshold, halves and zeros of both signs among them."""
    grid = Grid(step)
    largest = torch.arange(grid.threshold - 64, grid.threshold, dtype=torch.int32).view(torch.float32)
    halves = (torch.arange(-500, 500) + 0.5) * grid.width
    x = torch.cat([largest, -largest, halves, torch.tensor([0.0, -0.0, 1e-45]), largest[0] * torch.rand(4000)])
    codes, made = run("reference", "encode_uniform", x, out=torch.int32, device=device, grid=grid)
    found, sums = run("cpu", "encode_uniform", x, out=torch.int32, device=device, grid=grid)
    assert same_bits(found, codes)
    agree(sums, made)
    one = torch.ones_like(x)
    codes, made = run("reference", "encode_direction", x, one, out=torch.int32, device=device, grid=grid, eps=1e-8)
    found, sums = run("cpu", "encode_direction", x, one, out=torch.int32, device=device, grid=grid, eps=1e-8)
    assert same_bits(found, codes)
    agree(sums, made)


def test_codes_keep_the_order_across_the_threshold() -> None:
    grid = Grid(0.75)
    x = torch.tensor([(LIMIT - 2) * 0.75, (LIMIT - 1) * 0.75, LIMIT * 0.75, LIMIT * 0.75 + 1, 3.4028235e38])
    codes = torch.empty(5, dtype=torch.int32)
    kernels.get("reference").encode_uniform(x, codes, grid=grid)
    assert codes.tolist() == sorted(set(codes.tolist()))
    assert codes[2] == LIMIT


BAD: list[tuple[list[float], list[float], int]] = [
    ([float("nan")], [1.0], NAN), ([float("inf")], [1.0], INF), ([1.0], [-1.0], NEGATIVE), ([1.0], [-1e-45], NEGATIVE),
    ([1.0], [float("nan")], NAN), ([1.0], [float("inf")], INF), ([float("nan")], [-1.0], NAN | NEGATIVE),
    ([1e38], [0.0], INF), ([1.0], [-0.0], 0),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("m", "v", "flags"), BAD)
def test_what_cannot_be_encoded_is_flagged(
    name: str, m: list[float], v: list[float], flags: int, device: torch.device
) -> None:
    first, second = torch.zeros(5000), torch.zeros(5000)
    first[4500], second[4500] = m[0], v[0]
    _, made = run(name, "encode_direction", first, second, out=torch.int32, device=device, grid=Grid(0.01), eps=1e-8)
    assert made[0] == flags
    _, made = run(name, "encode_uniform", first, out=torch.int32, device=device, grid=Grid(0.01))
    assert made[0] == flags & (NAN | INF) * (not np.isfinite(m[0]))
    _, made = run(name, "encode_logarithmic", second, out=torch.int16, device=device, grid=LogGrid(4))
    assert made[0] == (0 if np.isfinite(v[0]) and v[0] >= 0 else flags & ~(NAN if np.isnan(m[0]) else 0))


@pytest.mark.parametrize("name", NAMES)
def test_nothing(name: str, device: torch.device) -> None:
    empty, how = torch.empty(0), {"grid": Grid(1.0), "out": torch.int32, "device": device}
    assert run(name, "encode_uniform", empty, **how)[1][0] == 0
    assert run(name, "encode_logarithmic", empty, out=torch.int16, device=device, grid=LogGrid(1))[1][0] == 0
    assert run(name, "encode_direction", empty, empty, eps=1.0, **how)[1][0] == 0


def test_the_error_of_a_direction_does_not_see_the_stored_root(same_bits: Callable[[Tensor, Tensor], bool]) -> None:
    """Encoded with the true second moment and decoded with a rough one, u is off by rounding alone."""
    generator = torch.Generator().manual_seed(3)
    v = torch.rand(20_000, generator=generator) ** 4 + 1e-6
    m = torch.randn(20_000, generator=generator) * v.sqrt()
    rough, grid, eps = v * 2.0 ** (torch.rand(20_000, generator=generator) - 0.5), Grid(0.02), 1e-8
    codes, decoded = torch.empty(20_000, dtype=torch.int32), torch.empty(20_000)
    backend = kernels.get("cpu")
    _, made = backend.encode_direction(m, v, codes, grid=grid, eps=eps)
    backend.decode_direction(codes, rough, decoded, grid=grid, eps=eps)
    u, w = m.double() / (v.double().sqrt() + eps), decoded.double() / (rough.double().sqrt() + eps)
    error = float((w - u).square().sum())
    assert made.sum_sq_diff == pytest.approx(error, rel=1e-5)
    assert (error / 20_000) ** 0.5 == pytest.approx(0.02 / 12**0.5, rel=0.02)
