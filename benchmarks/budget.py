"""Error budgets against presets on three trained models: what is reached, and at what size.

python benchmarks/budget.py        -> benchmarks/results/budget.json
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from chain import checkpoint, train
from common import CACHE, record, spent
from torch import Tensor, nn
from torch.nn import functional as F

import statecodec

LIMITS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2)
PRESETS = ("lossless", "resume", "small", "tiny")


def main() -> None:
    """Measure and record."""
    train()
    models = {"gpt": checkpoint(600), "conv": cached("conv", conv), "perceptron": cached("perceptron", perceptron)}
    record("budget", {name: one(path) for name, path in models.items()})


def one(checkpoint: Path) -> dict[str, Any]:
    """Presets and budgets on one checkpoint; the combined budget takes over the errors of `tiny`."""
    output = CACHE / "budget.sc.safetensors"
    presets = {p: figures(statecodec.compress(checkpoint, output, preset=p, force=True, verify=True)) for p in PRESETS}
    budgets = []
    for limit in LIMITS:
        with spent() as time:
            report = statecodec.compress(checkpoint, output, max_update_error=limit, force=True)
        budgets.append({"limit": limit, **figures(report), "cpu_seconds": time.cpu})
    tiny = presets["tiny"]
    both = statecodec.compress(
        checkpoint, output, max_update_error=tiny["update_error"], max_weight_error=tiny["weight_error"], force=True
    )
    at_presets = {
        p: figures(statecodec.compress(checkpoint, output, max_update_error=presets[p]["update_error"], force=True))
        for p in ("resume", "small")
    }
    return {
        "params": both.num_params, "presets": presets, "budgets": budgets, "at_the_error_of": at_presets,
        "at_both_errors_of_tiny": figures(both),
    }  # fmt: skip


def figures(report: statecodec.Report) -> dict[str, Any]:
    """Size and errors, as verified after writing."""
    total = report.total or {}
    return {
        "bytes": report.bytes, "bytes_per_param": report.bytes_per_param, "update_error": total["u_rms"],
        "weight_error": total["weight_relative_rms"], "max_u": total["max_u"], "max_u_exact": total["max_u_exact"],
    }  # fmt: skip


def cached(name: str, make: Callable[[], nn.Module]) -> Path:
    """A small classifier trained for 400 steps on noisy prototypes; cached."""
    path = CACHE / f"{name}.pt"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        net = make()
        optimizer = torch.optim.AdamW(net.named_parameters(), lr=1e-3)
        for step in range(400):
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def conv() -> nn.Module:
    """About 0.4 M parameters."""
    body = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3)]
    return nn.Sequential(*body, nn.ReLU(), nn.Flatten(), nn.Linear(128 * 36, 64), nn.ReLU(), nn.Linear(64, 10))


def perceptron() -> nn.Module:
    """About 0.4 M parameters."""
    hidden = [nn.Linear(144, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 10))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Ten smooth 12 x 12 prototypes under noise."""
    prototypes = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(10, (64,), generator=generator)
    smooth = F.interpolate(prototypes, size=12, mode="bilinear")
    return smooth[labels] + torch.randn(64, 1, 12, 12, generator=generator), labels


if __name__ == "__main__":
    main()
