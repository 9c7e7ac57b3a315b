"""Budgets on trained models: reached, verified by another route, and no larger than the best preset that meets them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import statecodec
from statecodec.choose.budgeted import Limits
from statecodec.errors import UsageError, VerificationFailed

PRESETS = ("lossless", "resume", "small", "tiny")


def update(state: dict[str, torch.Tensor], betas: tuple[float, float], eps: float) -> np.ndarray:
    """Adam's direction of one parameter, in numpy float64."""
    m, v = (state[k].numpy().astype(np.float64) for k in ("exp_avg", "exp_avg_sq"))
    t = float(state["step"])
    return (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def errors(exact: Path, other: Path) -> tuple[float, float]:
    """(update error, weight error) over the whole checkpoint, from torch.load and numpy alone."""
    a, b = (torch.load(p, weights_only=True) for p in (exact, other))
    total = np.zeros(4)
    for group in a["optimizer"]["param_groups"]:
        for i in group["params"]:
            u, w = (update(c["optimizer"]["state"][i], group["betas"], group["eps"]) for c in (a, b))
            total[:2] += (u**2).sum(), ((w - u) ** 2).sum()
    seen = set()
    for name, x in a["model"].items():
        if x.is_floating_point() and x.data_ptr() not in seen and "running" not in name:
            seen.add(x.data_ptr())
            y = b["model"][name]
            total[2:] += (x.double() ** 2).sum().item(), ((y.double() - x.double()) ** 2).sum().item()
    return float((total[1] / total[0]) ** 0.5), float((total[3] / total[2]) ** 0.5)


@pytest.mark.parametrize("limit", [0.004, 0.02, 0.15])
def test_update_budget(run: list[Path], limit: float, tmp_path: Path) -> None:
    made = statecodec.compress(run[-1], tmp_path / "a.sc.safetensors", max_update_error=limit)
    statecodec.restore(made.path, tmp_path / "a.pt")
    reached, weights = errors(run[-1], tmp_path / "a.pt")
    assert reached <= limit * (1 + 1e-6)
    assert reached > 0.8 * limit, "budget left unspent"
    assert made.total is not None
    assert made.total["u_rms"] == pytest.approx(reached, rel=1e-3)
    assert any("update error" in note for note in made.notes)
    for preset in PRESETS:
        point = statecodec.compress(run[-1], tmp_path / f"{preset}.sc.safetensors", preset=preset, verify=True)
        assert point.total is not None
        # A preset meets the budget if its weights are as exact, too: the budget leaves them at 24 bits.
        if point.total["u_rms"] <= limit and point.total["weight_relative_rms"] <= weights * 1.01:
            assert made.bytes <= point.bytes, preset


def test_both_budgets_beat_the_preset_of_their_errors(run: list[Path], tmp_path: Path) -> None:
    tiny = statecodec.compress(run[-1], tmp_path / "tiny.sc.safetensors", preset="tiny", verify=True)
    assert tiny.total is not None
    limits = {"max_update_error": tiny.total["u_rms"], "max_weight_error": tiny.total["weight_relative_rms"]}
    made = statecodec.compress(run[-1], tmp_path / "a.sc.safetensors", **limits)
    statecodec.restore(made.path, tmp_path / "a.pt")
    reached = errors(run[-1], tmp_path / "a.pt")
    assert reached[0] <= limits["max_update_error"] * (1 + 1e-6)
    assert reached[1] <= limits["max_weight_error"] * (1 + 1e-3)
    assert made.bytes <= tiny.bytes


def test_size_falls_as_the_budget_grows(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    sizes = [
        statecodec.compress(runs["mlp"][-1], tmp_path / f"{x}.sc.safetensors", max_update_error=x).bytes
        for x in (0.001, 0.01, 0.05, 0.2)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.3 * sizes[-1]


def test_own_rules_go_first(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    made = statecodec.compress(
        runs["mlp"][-1], tmp_path / "a.sc.safetensors", rules=["*1.weight:exp_avg=raw"], max_update_error=0.05
    )
    kept = {t.name: t.codec for t in made.tensors if t.role == "exp_avg"}
    assert kept["optimizer.state.0.exp_avg"] == "raw"
    assert made.total is not None
    assert made.total["u_rms"] <= 0.05
    with pytest.raises(UsageError, match="your own rules"):
        statecodec.compress(
            runs["mlp"][-1], tmp_path / "b.sc.safetensors", rules=["exp_avg:numel>=64=folded"], max_update_error=0.01
        )
    assert not (tmp_path / "b.sc.safetensors").exists()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_budgets_are_positive_numbers(runs: dict[str, list[Path]], value: float, tmp_path: Path) -> None:
    for name in ("max_update_error", "max_weight_error"):
        with pytest.raises(UsageError, match=name):
            statecodec.compress(runs["mlp"][-1], tmp_path / "a.sc.safetensors", **{name: value})


def test_needs_something_to_spend_it_on(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.randn(100, 100)}}, tmp_path / "weights.pt")
    with pytest.raises(UsageError, match="no pairs of exp_avg"):
        statecodec.compress(tmp_path / "weights.pt", max_update_error=0.01)


def test_a_budget_that_was_missed_is_an_error() -> None:
    Limits(update=0.01).check({"u_rms": 0.01})
    with pytest.raises(VerificationFailed, match="above the budget"):
        Limits(update=0.01).check({"u_rms": 0.0101})
    with pytest.raises(VerificationFailed):
        Limits(weight=0.01).check({})


def test_values_that_no_codec_takes(tmp_path: Path) -> None:
    """NaN in one moment: kept exact, the rest is allocated."""
    net = torch.nn.Linear(128, 64)
    optimizer = torch.optim.AdamW(net.named_parameters())
    net(torch.randn(4, 128)).square().mean().backward()
    optimizer.step()
    optimizer.state[net.weight]["exp_avg"][3, 3] = float("nan")
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "nan.pt")
    made = statecodec.compress(tmp_path / "nan.pt", max_update_error=0.01)
    statecodec.restore(made.path, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(back.isnan(), optimizer.state[net.weight]["exp_avg"].isnan())


def test_large_tensors_are_sampled_and_still_kept_under_the_budget(
    runs: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from statecodec.choose import measure

    monkeypatch.setattr(measure, "_WHOLE", 4096)
    monkeypatch.setattr(measure, "_PIECE", 512)
    for name in ("mlp", "conv"):
        made = statecodec.compress(runs[name][-1], tmp_path / f"{name}.sc.safetensors", max_update_error=0.03)
        assert made.total is not None
        assert 0.6 * 0.03 < made.total["u_rms"] <= 0.03 * (1 + 1e-6)
