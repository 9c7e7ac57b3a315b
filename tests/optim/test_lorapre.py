"""LoRA-Pre's identities: what the factor updates are at full rank, under gauge and scale, and after silence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from statecodec import optim
from statecodec.optim.lorapre import track
from tests.optim.helpers import parameters, relative, run

EXACT = {"jacobi": False, "relative": True, "damping": 0.0, "cap": False}


def factors(p: int, q: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(p, r, generator=g, dtype=torch.float64), torch.randn(r, q, generator=g, dtype=torch.float64)


def targets(p: int, q: int, n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    mean = torch.randn(p, q, generator=g, dtype=torch.float64)
    return [mean + torch.randn(p, q, generator=g, dtype=torch.float64) for _ in range(n)]


def test_gauss_seidel_at_full_rank_is_the_average() -> None:
    left, right = factors(8, 8, 8)
    average, beta = left @ right, 0.9
    for t in targets(8, 8, 10):
        track(left, right, t, beta**0.5, **EXACT)
        average = beta * average + (1 - beta) * t
        assert relative(left @ right, average) < 1e-8


def test_from_a_zero_start_too() -> None:
    left, right = torch.zeros(8, 8, dtype=torch.float64), factors(8, 8, 8)[1]
    average = torch.zeros(8, 8, dtype=torch.float64)
    for t in targets(8, 8, 10):
        track(left, right, t, 0.9**0.5, **EXACT)
        average = 0.9 * average + 0.1 * t
        assert relative(left @ right, average) < 1e-8


def test_jacobi_contracts_by_another_factor() -> None:
    """About a constant target the printed form contracts by 1 - 2g instead of (1 - g)**2: it is not the average."""
    left, right = (torch.linalg.qr(f).Q for f in factors(8, 8, 8))
    target, keep = left @ right + 1e-6 * factors(8, 8, 8, 1)[0], 0.9**0.5
    before = (left @ right - target).norm()
    track(left, right, target, keep, **{**EXACT, "jacobi": True})
    ratio = float((left @ right - target).norm() / before)
    assert ratio == pytest.approx(1 - 2 * (1 - keep), abs=1e-5)


@pytest.mark.parametrize("jacobi", [False, True])
def test_gauge(jacobi: bool) -> None:
    """(B S, S^-1 A) is the same momentum, and stays the same one."""
    left, right = factors(12, 9, 4)
    mixing = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q * 3
    other_left, other_right = left @ mixing, torch.linalg.solve(mixing, right)
    for t in targets(12, 9, 5):
        for b, a in ((left, right), (other_left, other_right)):
            track(b, a, t, 0.95, **{**EXACT, "jacobi": jacobi})
        assert relative(other_left @ other_right, left @ right) < 1e-9


@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1e6])
def test_scaled_gradients_scale_the_momentum(scale: float) -> None:
    """Relative damping works whatever the loss is multiplied with; absolute damping loses everything at 1e-8."""
    results = []
    for c in (1.0, scale):
        left, right = torch.zeros(12, 4), factors(12, 9, 4)[1].float() * 0.02
        for t in targets(12, 9, 30):
            track(left, right, t.float() * c, 0.95, jacobi=False, relative=True, damping=1e-4, cap=True)
        results.append((left @ right).double() / c)
    assert relative(results[1], results[0]) < 1e-3
    left, right = torch.zeros(12, 4), factors(12, 9, 4)[1].float() * 0.02
    for t in targets(12, 9, 200):
        track(left, right, t.float() * 1e-8, 0.95, jacobi=False, relative=False, damping=1e-6, cap=False)
    assert (left @ right).norm() * 1e8 < 0.1 * results[0].norm()


def test_the_updates_order_and_formulas() -> None:
    left, right = factors(6, 5, 2)
    b, a, t, keep = left.clone(), right.clone(), targets(6, 5, 1)[0], 0.8
    track(left, right, t, keep, **EXACT)
    new = keep * b + (1 - keep) * t @ torch.linalg.pinv(a)
    exact = keep * a + (1 - keep) * torch.linalg.pinv(new) @ t
    assert relative(left @ right, new @ exact) < 1e-10


def test_a_constant_target_is_approached_like_by_the_average() -> None:
    left, right = torch.zeros(20, 5), factors(20, 15, 5)[1].float() * 0.02
    target = targets(20, 15, 1)[0].float()
    best = float(torch.linalg.svdvals(target)[5:].norm())
    for _ in range(40):
        track(left, right, target, 0.9**0.5, jacobi=False, relative=True, damping=1e-4, cap=True)
    assert float((left @ right / (1 - 0.9**40) - target).norm()) < 1.5 * best
    left, right = torch.zeros(20, 5), factors(20, 15, 5)[1].float() * 0.02
    within = (factors(20, 15, 3, 5)[0] @ factors(20, 15, 3, 6)[1]).float()
    for t in range(1, 41):
        track(left, right, within, 0.9**0.5, jacobi=False, relative=True, damping=1e-4, cap=True)
        if t >= 8:
            assert float((left @ right).norm()) == pytest.approx((1 - 0.9**t) * float(within.norm()), rel=0.05)


@pytest.mark.parametrize("capped", [False, True])
def test_silence_then_a_gradient(capped: bool) -> None:
    """200 zero gradients, then real ones: the printed form overshoots by orders of magnitude, ours by nothing."""
    norms = {}
    for jacobi in (False, True):
        left, right = torch.zeros(24, 4), factors(24, 16, 4)[1].float() * 0.02
        average = torch.zeros(24, 16)
        for t in targets(24, 16, 20) + [torch.zeros(24, 16)] * 200 + targets(24, 16, 1):
            track(left, right, t.float(), 0.9**0.5, jacobi=jacobi, relative=True, damping=1e-4, cap=capped)
            average = 0.9 * average + 0.1 * t.float()
        norms[jacobi] = float((left @ right).norm() / average.norm())
    assert norms[False] < 1.05
    assert (norms[True] < 1.05) if capped else (norms[True] > 100)


def test_factors_survive_a_very_long_silence() -> None:
    left, right = torch.zeros(12, 4), factors(12, 9, 4)[1].float() * 0.02
    for t in targets(12, 9, 3) + [torch.zeros(12, 9)] * 5000 + targets(12, 9, 30):
        track(left, right, t.float(), 0.9**0.5, jacobi=False, relative=True, damping=1e-4, cap=True)
    assert (left @ right).norm() > 0.3


@pytest.mark.parametrize("variant", ["safe", "paper"])
def test_the_first_step_is_adams(variant: str) -> None:
    a, b = parameters(), parameters()
    run(optim.LoRAPre(a.items(), lr=1e-2, rank=4, scale=1.0, variant=variant), a, range(1))
    run(torch.optim.AdamW(b.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0), b, range(1))
    start = parameters()
    assert all(relative(a[k] - start[k], b[k] - start[k]) < 1e-6 for k in a)


def test_other_parameters_are_adamw_and_high_ranks_fall_back() -> None:
    a, b = parameters(), parameters()
    optimizer = optim.LoRAPre(a.items(), lr=1e-2, rank=24, weight_decay=0.1)
    run(optimizer, a, range(20))
    run(torch.optim.AdamW(b.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), b, range(20))
    for k in a:
        assert "left" not in optimizer.state[a[k]]["exp_avg"].parts
        assert relative(a[k], b[k]) < 1e-6


def test_numel_of_the_state() -> None:
    for base, copies in (("adam", 2), ("muon", 1)):
        p = nn.Parameter(torch.zeros(30, 50))
        p.grad = torch.ones(30, 50)
        optimizer = optim.LoRAPre([p], rank=3, base=base)
        optimizer.step()
        numel = sum(t.numel() for s in optimizer.state[p].values() if hasattr(s, "parts") for t in s.parts.values())
        assert numel == copies * (30 + 50) * 3


def test_seeds() -> None:
    def start(seed: int) -> Tensor:
        p = nn.Parameter(torch.zeros(30, 50))
        optimizer = optim.LoRAPre([p], rank=3, seed=seed)
        state = optimizer.ensure_state(p, optimizer.param_groups[0])
        assert not torch.equal(state["exp_avg"].parts["right"], state["exp_avg_sq"].parts["right"])
        right: Tensor = state["exp_avg"].parts["right"]
        return right

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_matched_bias_correction_is_exact_for_constant_magnitudes() -> None:
    """|g| constant: the update should be lr at every step; the paper's correction doubles it around step 10."""
    signs = torch.sign(torch.randn(5, 9, generator=torch.Generator().manual_seed(0)))
    for correction, exact in (("matched", True), ("paper", False)):
        p = nn.Parameter(torch.zeros(5, 9))
        optimizer = optim.LoRAPre(
            [p], lr=1.0, scale=1.0, rank=4, betas=(0.0, 0.95), bias_correction=correction, damping=1e-6
        )
        worst = 0.0
        for _ in range(30):
            before = p.detach().clone()
            p.grad = torch.ones(5, 9) * 0.3 * signs
            optimizer.step()
            worst = max(worst, float(((before - p.detach()).abs() - 1).abs().max()))
        assert worst < 0.1 if exact else worst > 0.5, worst


def test_the_dense_second_moment_has_adams_bias() -> None:
    """|g| constant: v of the dense form must be g**2 (1 - beta2**t), whatever the low-rank average started like."""
    p = nn.Parameter(torch.zeros(5, 9))
    optimizer = optim.LoRAPre([p], rank=4, betas=(0.9, 0.95), damping=1e-6)
    for t in range(1, 13):
        p.grad = torch.full((5, 9), 0.3)
        optimizer.step()
        v = optimizer.state_dict(dense=True)["state"][0]["exp_avg_sq"]
        # A quarter: the row space turns slowly towards the gradient's. Uncorrected, it would be a sixth at t = 12.
        assert float(v.mean()) == pytest.approx(0.09 * (1 - 0.95**t), rel=0.25)
    other = nn.Parameter(torch.zeros(5, 9))
    adam = optim.AdamW([other], moments="dense", betas=(0.9, 0.95))
    adam.load_state_dict(optimizer.state_dict())
    again = optim.LoRAPre([other], rank=4, betas=(0.9, 0.95))
    again.load_state_dict(adam.state_dict())
    ours, theirs = (o.state[q]["exp_avg_sq"].decode() for o, q in ((again, other), (optimizer, p)))
    assert relative(ours, theirs) < 1e-3


@pytest.mark.parametrize("variant", ["safe", "paper"])
def test_the_safe_variant_caps_even_jacobi(variant: str) -> None:
    p = nn.Parameter(torch.zeros(24, 16))
    optimizer = optim.LoRAPre([p], rank=4, betas=(0.9, 0.95), variant=variant, factor_update="jacobi")
    average = torch.zeros(24, 16)
    for t in targets(24, 16, 20) + [torch.zeros(24, 16)] * 120 + targets(24, 16, 1):
        p.grad = t.float()
        optimizer.step()
        average = 0.9 * average + 0.1 * t.float()
    ratio = float(optimizer.state[p]["exp_avg"].decode().norm() / average.norm())
    assert (ratio < 1.05) if variant == "safe" else (ratio > 5)
