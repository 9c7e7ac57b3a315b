"""Errors in optimizer steps against float64: what `diff`, `compress` and `verify` say of every kind of optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import statecodec
from statecodec.choose.budget import Budget
from statecodec.errors import VerificationFailed

LR, SHAPES = 3e-3, ((96, 192), (160, 64), (24,))
BETAS, EPS, STEPS = (0.9, 0.95), 1e-8, 7
State = dict[str, torch.Tensor]


def rms(x: torch.Tensor) -> float:
    return float(np.sqrt((x.double().numpy() ** 2).mean()))


def direction(state: State) -> torch.Tensor:
    """Adam's, in float64."""
    m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()
    return (m / (1 - BETAS[0] ** STEPS)) / ((v / (1 - BETAS[1] ** STEPS)).sqrt() + EPS)


SGD, MUON = {"momentum": 0.9, "dampening": 0, "nesterov": False}, {"ns_steps": 5, "nesterov": True, "momentum": 0.95}
OPTIMIZERS: dict[str, tuple[dict[str, Any], str, Callable[[torch.Tensor, State], float]]] = {
    "sgd": (SGD, "momentum_buffer", lambda w, s: rms(s["momentum_buffer"])),
    "lion": ({"betas": (0.9, 0.99)}, "exp_avg", lambda w, s: 1.0),
    "muon": (MUON | {"adjust_lr_fn": None}, "momentum_buffer", lambda w, s: 1 / math.sqrt(w.shape[-1])),
    "muon like adamw": (MUON | {"adjust_lr_fn": "match_rms_adamw"}, "momentum_buffer", lambda w, s: 0.2),
}
"""Settings of the group, the key of the momentum, and the rms of what lr is multiplied by, in one step."""


def content(name: str, *, lr: float | None = LR, seed: int = 0) -> dict[str, Any]:
    settings, key, _ = OPTIMIZERS[name]
    shapes = [shape for shape in SHAPES if len(shape) == 2 or not name.startswith("muon")]
    generator = torch.Generator().manual_seed(seed)
    model = {f"w{i}": 0.1 * torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    state = {i: {key: 10.0**-i * torch.randn(w.shape, generator=generator)} for i, w in enumerate(model.values())}
    group = {**settings, "params": list(state), "weight_decay": 0.0, **({} if lr is None else {"lr": lr})}
    return {"model": model, "optimizer": {"state": state, "param_groups": [group]}}


def noisy(x: torch.Tensor, size: float) -> torch.Tensor:
    return x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_momentum_is_counted_in_its_own_rms_and_its_weight_in_the_step_that_it_makes(
    name: str, tmp_path: Path
) -> None:
    key, step_of = OPTIMIZERS[name][1:]
    exact, other = content(name), content(name)
    exact["model_ema"] = {k: noisy(w, 1e-4) for k, w in exact["model"].items()}
    other["model_ema"] = {k: noisy(w, 3e-4) for k, w in exact["model_ema"].items()}
    wanted, totals = {}, {"momentum_step_error": [0.0, 0], "weight_step_error": [0.0, 0]}
    for i, (k, w) in enumerate(exact["model"].items()):
        m, step = exact["optimizer"]["state"][i][key], LR * step_of(w, exact["optimizer"]["state"][i])
        other["model"][k] = noisy(w, 1e-4 * (i + 1))
        other["optimizer"]["state"][i][key] = noisy(m, 1e-3 * (i + 1) * rms(m))
        found = (other["model"][k], other["optimizer"]["state"][i][key])
        errors = rms(found[0].double() - w.double()) / step, rms(found[1].double() - m.double()) / rms(m)
        wanted |= {f"model.{k}": errors[0], f"optimizer.state.{i}.{key}": errors[1]}
        wanted[f"model_ema.{k}"] = rms(other["model_ema"][k].double() - exact["model_ema"][k].double()) / step
        for total, error in zip(("weight_step_error", "momentum_step_error"), errors, strict=True):
            totals[total][0] += w.numel() * error**2
            totals[total][1] += w.numel()
    torch.save(exact, tmp_path / "a.pt")
    torch.save(other, tmp_path / "b.pt")
    report = statecodec.diff(tmp_path / "a.pt", tmp_path / "b.pt")
    assert {t.name: t.step_error for t in report.tensors} == pytest.approx(wanted, rel=1e-5)
    for total, (squares, numel) in totals.items():
        assert report.total[total] == pytest.approx(math.sqrt(squares / numel), rel=1e-5)
    assert "u_rms" not in report.total
    assert "\nstep error: momenta 0." in str(report)


def test_learning_rates_that_are_0_or_missing_are_the_largest_of_the_file(tmp_path: Path) -> None:
    exact = content("sgd")
    group = exact["optimizer"]["param_groups"][0]
    del group["lr"]
    groups = [group | {"params": [0], "lr": 0.0}, group | {"params": [1], "lr": LR}, group | {"params": [2]}]
    exact["optimizer"]["param_groups"] = groups
    torch.save(exact, tmp_path / "a.pt")
    torch.save(exact | {"model": {k: noisy(w, 1e-4) for k, w in exact["model"].items()}}, tmp_path / "b.pt")
    errors = {t.name: t.step_error for t in statecodec.diff(tmp_path / "a.pt", tmp_path / "b.pt").tensors}
    for i, (k, w) in enumerate(exact["model"].items()):
        step = LR * rms(exact["optimizer"]["state"][i]["momentum_buffer"])
        assert errors[f"model.{k}"] == pytest.approx(rms(noisy(w, 1e-4).double() - w.double()) / step, rel=1e-5)


def test_without_a_learning_rate_momenta_have_an_error_in_steps_and_weights_none(tmp_path: Path) -> None:
    exact, other = content("sgd", lr=None), content("sgd", lr=None)
    other["model"]["w0"] += 1e-4
    other["optimizer"]["state"][0]["momentum_buffer"] *= 1.25
    torch.save(exact, tmp_path / "a.pt")
    torch.save(other, tmp_path / "b.pt")
    report = statecodec.diff(tmp_path / "a.pt", tmp_path / "b.pt")
    errors = {t.name: t.step_error for t in report.tensors}
    assert errors["optimizer.state.0.momentum_buffer"] == pytest.approx(0.25)
    assert errors["optimizer.state.1.momentum_buffer"] == 0
    assert errors["model.w0"] is None
    assert "weight_step_error" not in report.total


def test_a_first_moment_of_adam_has_the_error_of_its_update(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state: State = {"exp_avg": torch.randn(96, 64, generator=generator), "step": torch.tensor(float(STEPS))}
    state["exp_avg_sq"] = state["exp_avg"].square() * (1 + torch.rand(96, 64, generator=generator))
    group = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0, "params": [0]}
    exact = {"model": {"w": torch.randn(96, 64)}, "optimizer": {"state": {0: state}, "param_groups": [group]}}
    torch.save(exact, tmp_path / "a.pt")
    u = direction(state)
    state["exp_avg"] = noisy(state["exp_avg"], 0.01)
    exact["model"]["w"] = noisy(exact["model"]["w"], 1e-4)
    torch.save(exact, tmp_path / "b.pt")
    report = statecodec.diff(tmp_path / "a.pt", tmp_path / "b.pt")
    errors = {t.role: t.step_error for t in report.tensors}
    assert errors["exp_avg"] == pytest.approx(rms(direction(state) - u) / rms(u), rel=1e-4)
    assert errors["exp_avg_sq"] is None
    weight = torch.load(tmp_path / "a.pt")["model"]["w"].double()
    assert errors["weight"] == pytest.approx(rms(exact["model"]["w"].double() - weight) / (LR * rms(u)), rel=1e-4)
    assert "momentum_step_error" not in report.total


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fraction", [0.01, 0.3])
def test_compress_states_the_errors_that_diff_measures(name: str, fraction: float, tmp_path: Path) -> None:
    path, target = tmp_path / "ckpt.pt", tmp_path / "c.sc.safetensors"
    torch.save(content(name), path)
    made = statecodec.compress(path, target, max_step_error=fraction)
    measured = statecodec.compress(path, target, max_step_error=fraction, verify=True, force=True)
    compared = statecodec.diff(path, target)
    for total in ("momentum_step_error", "weight_step_error"):
        assert made.total is not None
        assert 0.2 * fraction < made.total[total] <= fraction
        for other in (measured, compared, statecodec.verify(target, path)):
            assert other.total is not None
            assert other.total[total] == pytest.approx(made.total[total], rel=0.01)  # those of 24 elements are exact
    found = {t.name: t.step_error for t in compared.tensors}
    for t in made.tensors:
        if t.error:
            assert found[t.name] == pytest.approx(t.error["step_error"], rel=1e-4)
    for i in (1, 2):
        statecodec.compress_share(path, tmp_path / "s.sc.safetensors", share=f"{i}/2", max_step_error=fraction)
    assert statecodec.finalize(path, tmp_path / "s.sc.safetensors").total == pytest.approx(made.total)
    backwards = {t.name: t.step_error for t in statecodec.diff(target, path).tensors}  # its momenta are known, no lr
    assert any(backwards[n] for n in backwards if n.startswith("optimizer"))
    assert not any(backwards[n] for n in backwards if n.startswith("model"))


@pytest.mark.parametrize("name", ["sgd", "muon"])
@pytest.mark.parametrize(("promise", "tensor"), [("u_rms", "optimizer.state.0"), ("weight_step_error", "model.w0")])
def test_verify_holds_momenta_and_weights_to_what_was_asked_for(
    name: str, promise: str, tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, target = tmp_path / "ckpt.pt", tmp_path / "c.sc.safetensors"
    torch.save(content(name), path)
    statecodec.compress(path, target, max_step_error=0.05)
    statecodec.verify(target, path)
    monkeypatch.setattr(Budget, "figures", {promise: 0.01})  # while 0.05 is what tensors are encoded with
    statecodec.compress(path, target, max_step_error=0.05, force=True)
    with pytest.raises(VerificationFailed, match=rf"{tensor}\S*: step error [\d.]+ % is above the 1 % that was asked"):
        statecodec.verify(target, path)
    with pytest.raises(VerificationFailed, match="is above the 1 % that was asked for"):
        statecodec.compress(path, tmp_path / "d.sc.safetensors", max_step_error=0.05, verify=True)
    assert not (tmp_path / "d.sc.safetensors").exists()


def test_verify_refuses_a_weight_that_a_rule_makes_coarser_than_was_asked_for(tmp_path: Path) -> None:
    torch.save(content("sgd"), tmp_path / "ckpt.pt")
    with pytest.raises(VerificationFailed, match=r"model\.w1: step error .* is above the 5 %"):
        statecodec.compress(tmp_path / "ckpt.pt", rules=["*.w1=uniform(step=1e-3)"], max_weight_error=0.05, verify=True)


@pytest.mark.parametrize("tail", [False, True], ids=["normal", "one large row in a sampled piece"])
def test_weights_in_24_bits_may_be_off_by_more_than_was_asked_for(tail: bool, tmp_path: Path) -> None:
    """Their steps are too small. What is kept in 24 bits is told by samples, which may see what is rare."""
    generator = torch.Generator().manual_seed(0)
    w, m = torch.randn(4000, 64, generator=generator), torch.randn(4000, 64, generator=generator)
    if tail:
        w[-16:] *= 1000
    for value in (w, m):
        assert value.isfinite().all()
    group = {"lr": 1e-5, "momentum": 0.9, "params": [0]}
    optimizer = {"state": {0: {"momentum_buffer": m}}, "param_groups": [group]}
    torch.save({"model": {"w": w}, "optimizer": optimizer}, tmp_path / "ckpt.pt")
    report = statecodec.compress(tmp_path / "ckpt.pt", max_step_error=0.01, verify=True)
    assert report.total is not None
    assert report.total["weight_step_error"] > 0.05
    assert "but weights in 24 bits up to" in str(report)


def test_momenta_in_16_bits_and_momenta_of_zeros_keep_what_was_asked_for(tmp_path: Path) -> None:
    checkpoint = content("sgd")
    state = checkpoint["optimizer"]["state"]
    state[0]["momentum_buffer"] = state[0]["momentum_buffer"].to(torch.bfloat16)
    state[1]["momentum_buffer"].zero_()
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for fraction in (0.0003, 0.001, 0.003, 0.01):
        report = statecodec.compress(tmp_path / "ckpt.pt", max_step_error=fraction, verify=True, force=True)
        assert report.total is not None
        assert report.total["momentum_step_error"] <= fraction * 1.001


def test_elements_without_an_update_do_not_make_the_step_smaller(tmp_path: Path) -> None:
    """Where v is 0 and m is not: `compress` leaves them out of the step, and so does what `verify` measures."""
    torch.manual_seed(0)
    net = nn.Linear(96, 96)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(64, 96)).square().mean().backward()
        optimizer.step()
    optimizer.state[net.weight]["exp_avg_sq"][:12] = 0.0
    content = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "ckpt.pt")
    report = statecodec.compress(tmp_path / "ckpt.pt", max_step_error=0.02, verify=True)
    (error,) = (t.error for t in report.tensors if t.name == "model.weight")
    assert error is not None
    assert 0.019 < error["step_error"] <= 0.02
