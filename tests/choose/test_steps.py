"""Errors are the stated fraction of a step: against float64, and where a step is not defined."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from statecodec import kernels
from statecodec.choose import steps
from statecodec.choose.steps import Correction
from statecodec.codecs import Direction, Logarithmic, Raw, Uniform

FRACTIONS = [0.003, 0.01, 0.1, 0.3]


def trained(scale: float = 1e-4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Moments of parameters whose gradients differ by orders of magnitude, after forty steps of Adam's averages."""
    generator = torch.Generator().manual_seed(seed)
    size = scale * torch.exp(torch.randn(300, 1, generator=generator) + torch.randn(1, 200, generator=generator))
    m, v = torch.zeros(300, 200), torch.zeros(300, 200)
    for _ in range(40):
        g = (torch.randn(300, 200, generator=generator) + 0.2) * size
        m, v = m * 0.9 + g * 0.1, v * 0.95 + g * g * 0.05
    return m, v


def update(m: Tensor, v: Tensor, c: Correction) -> Tensor:
    return (m.double() / c.c1) / ((v.double() / c.c2).sqrt() + c.eps)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("step", [1, 40, 10_000])
def test_an_update_is_off_by_the_fraction(fraction: float, step: int) -> None:
    m, v = trained()
    c = Correction.at(0.9, 0.95, 1e-8, step)
    exact = update(m, v, c)
    codec, second = steps.exp_avg(fraction, rms(exact), c), steps.exp_avg_sq(fraction)
    w = second.encode(v).decode()
    found = codec.encode(m, given={"exp_avg_sq": v}).decode(given={"exp_avg_sq": w})
    assert rms(update(found, w, c) - exact) / rms(exact) == pytest.approx(fraction, rel=0.03)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_weight_is_off_by_the_fraction_of_a_step(fraction: float) -> None:
    w = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)) * 0.02
    lr, moved = 3e-4, 0.4
    codec = steps.weight(fraction, rms(w), lr, moved, torch.float32)
    error = rms(codec.encode(w).decode().double() - w.double())
    limit = steps.COARSEST * rms(w) / steps.SPREAD
    assert error == pytest.approx(min(fraction * lr * moved, limit), rel=0.02)


def test_weights_are_never_coarser_than_bf16_nor_finer_than_24_bits() -> None:
    w = torch.randn(400, 500, generator=torch.Generator().manual_seed(2)) * 0.05
    coarsest = steps.weight(1.0, rms(w), 1.0, 1.0, torch.float32)
    error, limit = rms(coarsest.encode(w).decode() - w), rms(w.bfloat16().float() - w)
    assert 0.9 * limit < error < limit
    finest = steps.weight(1e-9, rms(w), 1e-9, 1.0, torch.float32)
    assert isinstance(finest, Uniform)
    assert finest.step == steps.FINEST * rms(w)
    assert finest.step / steps.SPREAD > rms(w) * 2.0**-23


@pytest.mark.parametrize("method", ["sgd", "lion", "muon"])
def test_momenta_are_off_by_a_fraction_of_themselves(method: steps.Method) -> None:
    m = torch.randn(300, 200, generator=torch.Generator().manual_seed(3)) * 1e-3
    codec = steps.momentum(0.01, rms(m), method)
    expected = 0.01 * (steps.MUON if method == "muon" else 1)
    assert rms(codec.encode(m).decode() - m) / rms(m) == pytest.approx(expected, rel=0.02)


def test_what_one_step_adds() -> None:
    assert steps.update_rms("adam", (30, 20), 0.3) == 0.3
    assert steps.update_rms("sgd", (30, 20), 1e-3) == 1e-3
    assert steps.update_rms("lion", (30, 20), 1e-3) == 1.0
    q = torch.linalg.qr(torch.randn(60, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    assert steps.update_rms("muon", (60, 20), 9.0) == pytest.approx(rms(q))
    assert steps.update_rms("muon", (60, 5, 2, 2), 9.0) == pytest.approx(rms(q))


def test_codes_per_octave_follow_the_fraction() -> None:
    found = [steps.exp_avg_sq(f) for f in (0.01, 0.1, 0.3, 1.0, 1e-9, 100.0)]
    assert found == [Logarithmic(n) for n in (10, 3, 2, 1, 64, 1)]
    assert steps.exp_avg_sq(0.0) == Raw()


@pytest.mark.parametrize("size", [1, 255, 256, 1000])
def test_the_size_of_an_update(size: int) -> None:
    """Both backends; where v is 0 an update says nothing, and where it is not finite neither."""
    m, v = (t.reshape(-1)[:size].clone() for t in trained())
    if size > 10:
        v[3], m[5], v[7], m[8], v[9] = 0.0, math.nan, math.inf, math.inf, -1.0
    c = Correction.at(0.9, 0.95, 1e-8, 40)
    u = update(m, v, c)
    u = u[(v > 0) & u.isfinite()]
    for backend in (kernels.get("reference"), kernels.host()):
        found = backend.update_size(m, v, correction1=c.c1, correction2=c.c2, eps=c.eps)  # type: ignore[attr-defined]
        assert found.numel == len(u)
        assert found.rms == pytest.approx(rms(u), rel=1e-5)
    assert found.merged(found).rms == pytest.approx(found.rms)
    assert kernels.host().update_size(m[:0], v[:0], correction1=1.0, correction2=1.0, eps=1.0).rms == 0.0


def test_dead_elements_do_not_coarsen_the_others() -> None:
    """A moment over a second moment of 0 is an update of m / eps: kept, and not what the grid is measured by."""
    m, v = trained()
    c = Correction.at(0.9, 0.95, 1e-8, 40)
    whole = kernels.host().update_size(m.view(-1), v.view(-1), correction1=c.c1, correction2=c.c2, eps=c.eps).rms
    m[0, :50], v[0, :50] = 1e-3, 0.0
    size = kernels.host().update_size(m.view(-1), v.view(-1), correction1=c.c1, correction2=c.c2, eps=c.eps)
    assert size.rms == pytest.approx(whole, rel=0.02)
    codec = steps.exp_avg(0.01, size.rms, c)
    found = codec.encode(m, given={"exp_avg_sq": v}).decode(given={"exp_avg_sq": v})
    assert torch.allclose(found[0, :50], m[0, :50], rtol=1e-3)


def test_learning_rates() -> None:
    assert steps.learning_rate(1e-3, 1e-2, [1.0]) == 1e-3
    assert steps.learning_rate(0.0, 1e-2, [1.0]) == 1e-2  # the end of a schedule
    assert steps.learning_rate(0.0, None, [None, 1e-4, 1e-3, math.nan]) == 1e-3
    assert steps.learning_rate(None, None, [None, 0.0]) is None
    assert steps.learning_rate(math.nan, -1.0, []) is None


def test_where_a_step_is_not_defined() -> None:
    c = Correction.at(0.9, 0.999, 0.0, None)
    assert c == Correction(1.0, 1.0, 0.0)
    w = steps.weight(0.01, 0.02, None, 0.5, torch.float32)
    assert w == Uniform(steps.FINEST * 0.02)  # no learning rate: the finest grid
    assert steps.weight(0.01, 0.02, 1e-3, None, torch.float32) == Raw()  # nothing trains it
    for dtype in (torch.bfloat16, torch.float16):
        assert steps.weight(0.3, 0.02, 1e-3, 0.5, dtype) == Raw()
        assert steps.average(w, dtype) == Raw()
    assert steps.average(w, torch.float32) == w
    assert steps.average(Raw(), torch.float32) == Raw()
    assert isinstance(steps.exp_avg(0.01, 0.5, c), Direction)  # eps of 0
    for nothing in (0.0, 1e-60):  # an all-zero moment: any grid
        assert (
            not steps.exp_avg(0.01, nothing, c)
            .encode(torch.zeros(70), given={"exp_avg_sq": torch.zeros(70)})
            .parts["codes"]
            .any()
        )
    for unknown in (math.nan, math.inf):
        assert steps.exp_avg(0.01, unknown, c) == steps.momentum(0.01, unknown) == Raw()
        assert steps.weight(0.01, unknown, 1e-3, 0.5, torch.float32) == Raw()
