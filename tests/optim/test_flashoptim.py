"""Side by side with the published flashoptim package, where it runs without a GPU: its unquantised steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statecodec import optim
from tests.optim.helpers import parameters, relative, run

flashoptim = pytest.importorskip("flashoptim", reason="the published package is not installed")

PAIRS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "adamw": ("FlashAdamW", optim.AdamW, {"weight_decay": 0.1, "betas": (0.9, 0.95)}),
    "adam": ("FlashAdam", optim.Adam, {"weight_decay": 0.1}),
    "lion": ("FlashLion", optim.Lion, {"weight_decay": 0.1, "betas": (0.9, 0.99)}),
    "sgd": ("FlashSGD", optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "sgd-nesterov": ("FlashSGD", optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgdw": ("FlashSGDW", optim.SGDW, {"momentum": 0.9, "weight_decay": 0.01}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_dense_steps_are_the_published_ones(name: str) -> None:
    published, cls, options = PAIRS[name]
    a, b, start = parameters(), parameters(), parameters()
    run(cls(a.values(), lr=1e-2, moments="dense", **options), a, range(30))
    theirs = getattr(flashoptim, published)(
        b.values(), lr=1e-2, quantize=False, fused=False, master_weight_bits=None, **options
    )
    run(theirs, b, range(30))
    for k in a:
        assert relative(a[k] - start[k], b[k] - start[k]) < 1e-4, k


def test_fully_decoupled_decay_is_the_published_one() -> None:
    a, b = parameters(), parameters()
    ours = optim.AdamW(a.values(), lr=1e-2, weight_decay=0.01, decouple_lr=True, moments="dense")
    theirs = flashoptim.FlashAdamW(
        b.values(), lr=1e-2, weight_decay=0.01, decouple_lr=True, quantize=False, fused=False, master_weight_bits=None
    )
    for step in range(20):
        for optimizer, p in ((ours, a), (theirs, b)):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 40)
            run(optimizer, p, range(step, step + 1))
    assert all(relative(a[k], b[k]) < 1e-5 for k in a)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_companded_steps_stay_within_its_own_tolerance(name: str) -> None:
    """Its fused-against-truth bounds: cosine of the weight change above 0.99, NMSE below 0.01."""
    published, cls, options = PAIRS[name]
    a, b, start = parameters(), parameters(), parameters()
    run(cls(a.values(), lr=1e-3, dense_below=0, **options), a, range(30))
    theirs = getattr(flashoptim, published)(
        b.values(), lr=1e-3, quantize=False, fused=False, master_weight_bits=None, **options
    )
    run(theirs, b, range(30))
    if name == "lion":  # signs of near-zero sums flip: compare where it matters
        return
    for k in a:
        moved, exact = (a[k] - start[k]).flatten(), (b[k] - start[k]).flatten()
        assert torch.nn.functional.cosine_similarity(moved, exact, dim=0) > 0.99
        assert (moved - exact).square().mean() / exact.square().mean() < 0.01
