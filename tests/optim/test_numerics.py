"""The check that says when a step is too small to be seen, held against what really happens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from statecodec import optim


def weights(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter((torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 1).to(dtype))


def seen(p: nn.Parameter, optimizer: optim.StateOptimizer, gradient: float) -> float:
    """The fraction of (master) weights that one step changes."""
    before = optimizer.master_weight(p)
    p.grad = torch.full_like(p, gradient)
    optimizer.step()
    return float((optimizer.master_weight(p) != before).float().mean())


CASES = [(torch.bfloat16, None), (torch.bfloat16, "split24"), (torch.bfloat16, "split32"), (torch.float32, None)]


@pytest.mark.parametrize(("dtype", "master"), CASES)
@pytest.mark.parametrize("exponent", range(-27, -3, 2))
def test_a_step_is_reported_where_it_vanishes(dtype: torch.dtype, master: str | None, exponent: int) -> None:
    p = weights(dtype)
    optimizer = optim.SGD([p], lr=2.0**exponent, master_weights=master)
    found = [f for f in optim.invisible_steps(optimizer, typical_update=1.0) if f.kind == "step"]
    assert bool(found) == (seen(p, optimizer, 1.0) < 0.5)
    if found:
        assert found[0].change < found[0].needed
        assert "step" in str(found[0])


@pytest.mark.parametrize(("dtype", "master"), CASES)
@pytest.mark.parametrize("exponent", range(-27, -5, 2))
def test_decay_is_reported_where_it_vanishes(dtype: torch.dtype, master: str | None, exponent: int) -> None:
    p = weights(dtype)
    optimizer = optim.SGDW([p], lr=0.5, weight_decay=2.0**exponent * 2, master_weights=master)
    found = [f for f in optim.invisible_steps(optimizer) if f.kind == "decay"]
    changed = seen(p, optimizer, 0.0)
    if found:
        assert changed < 0.5
    if changed == 0:
        assert found


def test_stochastic_rounding_needs_no_warning() -> None:
    p = weights(torch.bfloat16)
    assert optim.invisible_steps(optim.AdamW([p], lr=1e-9))
    assert not optim.invisible_steps(optim.AdamW([p], lr=1e-9, stochastic_rounding=True))
    assert not optim.invisible_steps(optim.AdamW([p], lr=0.0))
    assert not optim.invisible_steps(optim.AdamW([nn.Parameter(torch.zeros(9))], lr=1e-9, weight_decay=0.0))
