"""Every method against its formulas of the papers, written again in float64 with numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from statecodec import optim

Array = NDArray[np.float64]
ROWS, COLS, STEPS = 12, 22, 25
LR, B1, B2, EPS, WD = 1e-2, 0.9, 0.95, 1e-8, 0.1


def problem() -> tuple[Array, list[Array]]:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(ROWS, COLS)) * 0.3
    return rng.normal(size=(ROWS, COLS)) * 0.1, [mean + rng.normal(size=(ROWS, COLS)) for _ in range(STEPS)]


def check(optimizer: Any, p: nn.Parameter, exact: Any, tolerance: float = 3e-6) -> None:
    """Step the optimizer and `exact(w, g, t) -> w` side by side."""
    w, grads = problem()
    with torch.no_grad():
        p.copy_(torch.from_numpy(w))
    start = w = p.detach().double().numpy().copy()
    for t, g in enumerate(grads, 1):
        p.grad = torch.from_numpy(g).to(p.dtype)
        optimizer.step()
        w = exact(w, p.grad.double().numpy(), t)
        error = np.linalg.norm(p.detach().double().numpy() - w) / np.linalg.norm(w - start)
        assert error < tolerance, (t, error)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(ROWS, COLS))


def test_lion() -> None:
    m = np.zeros((ROWS, COLS))

    def exact(w: Array, g: Array, t: int) -> Array:
        nonlocal m
        w = w * (1 - LR * WD) - LR * np.sign(B1 * m + (1 - B1) * g)
        m = B2 * m + (1 - B2) * g
        return w

    p = parameter()
    check(optim.Lion([p], lr=LR, betas=(B1, B2), weight_decay=WD, moments="dense"), p, exact)


def fold(x: Array, block: int, true_tail: bool) -> Array:
    blocks = -(-COLS // block)
    padded = np.zeros((ROWS, blocks * block))
    padded[:, :COLS] = x
    count = np.full(blocks, float(block))
    if true_tail and COLS % block:
        count[-1] = COLS % block
    return padded.reshape(ROWS, blocks, block).sum(-1) / count


@pytest.mark.parametrize("variant", ["safe", "official", "paper"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_foam(variant: str, level: int) -> None:
    block, alpha, rho, safe = 2**level, 0.25, 0.8, variant == "safe"
    m = v = np.zeros((ROWS, -(-COLS // block)))

    def unfold(x: Array) -> Array:
        return np.repeat(x, block, -1)[:, :COLS]

    def exact(w: Array, g: Array, t: int) -> Array:
        nonlocal m, v
        mean = fold(g, block, safe)
        square = mean**2 if variant == "paper" else fold(g * g, block, safe)
        m, v = B1 * m + (1 - B1) * mean, B2 * v + (1 - B2) * square
        rest = g - unfold(mean)
        top, root = unfold(m) + rho * rest, np.sqrt(unfold(v) + rho**2 * rest**2)
        c1, c2 = 1 - B1**t, 1 - B2**t
        if safe:
            return w * (1 - LR * WD) - LR * alpha * (top / c1) / (root / np.sqrt(c2) + EPS)
        w = w - LR * np.sqrt(c2) / c1 * alpha * top / (root + EPS)
        return w - LR * WD * w

    p = parameter()
    options = {"level": level, "scale": alpha, "residual_scale": rho, "variant": variant, "weight_decay": WD}
    check(optim.FOAM([p], lr=LR, betas=(B1, B2), eps=EPS, **options), p, exact)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), ()])
def test_slimadam(dims: tuple[int, ...]) -> None:
    m, v = np.zeros((ROWS, COLS)), np.zeros((ROWS, COLS)) if not dims else 0.0

    def exact(w: Array, g: Array, t: int) -> Array:
        nonlocal m, v
        m = B1 * m + (1 - B1) * g
        v = B2 * v + (1 - B2) * (np.mean(g * g, dims, keepdims=True) if dims else g * g)
        return w * (1 - LR * WD) - LR * (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)

    p = parameter()
    check(optim.SlimAdam([("w", p)], lr=LR, betas=(B1, B2), eps=EPS, weight_decay=WD, rules={"w": dims}), p, exact)


class Factors:
    """Block-wise Newton steps on 1/2 ||BA - T||**2, with the damping of each variant."""

    def __init__(self, left: Array, right: Array, jacobi: bool, relative: bool, damping: float) -> None:
        self.b, self.a, self.jacobi, self.relative, self.damping = left, right, jacobi, relative, damping

    def inverse(self, gram: Array) -> Array:
        d = self.damping * (np.trace(gram) / len(gram) if self.relative else 1.0)
        return np.linalg.inv(gram + (d if d > 0 else 1.0) * np.eye(len(gram)))

    def track(self, target: Array, gain: float) -> None:
        new = (1 - gain) * self.b + gain * target @ self.a.T @ self.inverse(self.a @ self.a.T)
        b = self.b if self.jacobi else new
        fit = gain * self.inverse(b.T @ b) @ b.T @ target
        self.a = (1.0 if self.jacobi and not b.any() else 1 - gain) * self.a + fit
        self.b = new

    @property
    def product(self) -> Array:
        return self.b @ self.a


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("variant", ["safe", "paper"])
@pytest.mark.parametrize("rank", [1, 5])
def test_lorapre(variant: str, rank: int, matched: bool) -> None:
    p = parameter()
    correction = "matched" if matched else "paper"
    o = optim.LoRAPre(
        [p],
        lr=LR,
        betas=(B1, B2),
        eps=EPS,
        weight_decay=WD,
        rank=rank,
        scale=0.5,
        variant=variant,
        bias_correction=correction,
    )
    o.ensure_state(p, o.param_groups[0])
    state = o.state[p]
    paper = variant == "paper"
    m, v = (
        Factors(
            *(state[k].parts[f].double().numpy().copy() for f in ("left", "right")),
            paper,
            not paper,
            1e-6 if paper else 1e-4,
        )
        for k in ("exp_avg", "exp_avg_sq")
    )

    def exact(w: Array, g: Array, t: int) -> Array:
        first = B1 * m.product + (1 - B1) * g
        second = B2 * v.product**2 + (1 - B2) * g * g
        m.track(g, 1 - B1**0.5)
        v.track(np.abs(g), 1 - B2**0.25)
        c2 = B2 * (1 - B2 ** ((t - 1) / 2)) ** 2 + 1 - B2 if matched else 1 - B2**t
        return w * (1 - LR * WD) - 0.5 * LR * (first / (1 - B1**t)) / (np.sqrt(second / c2) + EPS)

    check(
        o, p, exact, 2e-3
    )  # fp32 Grams of a barely damped system; the identities are tested to rounding in test_lorapre


def orthogonal(x: Array, steps: int = 5) -> Array:
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / np.linalg.norm(x)
    for _ in range(steps):
        g = x @ x.T
        x = a * x + (b * g + c * g @ g) @ x
    return x.T if tall else x


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon(nesterov: bool) -> None:
    buffer = np.zeros((ROWS, COLS))

    def exact(w: Array, g: Array, t: int) -> Array:
        nonlocal buffer
        buffer = 0.9 * buffer + 0.1 * g
        ahead = 0.9 * buffer + 0.1 * g if nesterov else buffer
        return w * (1 - LR * WD) - LR * 0.2 * np.sqrt(max(ROWS, COLS)) * orthogonal(ahead)

    p = parameter()
    check(optim.Muon([p], lr=LR, momentum=0.9, nesterov=nesterov, weight_decay=WD, moments="dense"), p, exact, 2e-5)


def test_lorapre_muon() -> None:
    p = parameter()
    o = optim.LoRAPre([p], lr=LR, momentum=0.9, weight_decay=WD, rank=5, base="muon")
    o.ensure_state(p, o.param_groups[0])
    parts = o.state[p]["momentum_buffer"].parts
    factors = Factors(*(parts[f].double().numpy().copy() for f in ("left", "right")), False, True, 1e-4)

    def exact(w: Array, g: Array, t: int) -> Array:
        heavy = 0.9 * factors.product + g
        factors.track(g / 0.1, 1 - 0.9**0.5)
        return w * (1 - LR * WD) - LR * 0.2 * np.sqrt(max(ROWS, COLS)) * orthogonal(heavy)

    check(o, p, exact, 1e-3)
