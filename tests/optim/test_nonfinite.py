"""One policy for all: a tensor whose gradient is not finite is left alone, to the bit, and counted."""

from __future__ import annotations

import copy

import pytest
import torch

from statecodec import optim
from tests.optim.helpers import EVERY, bits, gradients, parameters, run

BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "square overflows": 1e25}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", EVERY)
def test_a_bad_gradient_skips_its_own_tensor_only(name: str, bad: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = EVERY[name](params.items())
    run(optimizer, params, range(2))
    twin, twin_params = copy.deepcopy((optimizer, params))
    run(twin, twin_params, range(2, 3))
    for k, g in gradients(2).items():
        params[k].grad = g.to(torch.bfloat16)
    params["a.weight"].grad[3, 5] = BAD[bad]
    victim = params["a.weight"]
    before = bits({"p": victim, "s": {k: v for k, v in optimizer.state[victim].items() if k != "skipped"}})
    optimizer.step()
    assert bits({"p": victim, "s": {k: v for k, v in optimizer.state[victim].items() if k != "skipped"}}) == before
    assert optimizer.skipped() == {"a.weight": 1}
    for k in params.keys() - {"a.weight"}:
        assert bits(params[k]) == bits(twin_params[k]), k
        assert bits(optimizer.state[params[k]]) == bits(twin.state[twin_params[k]]), k
    run(optimizer, params, range(3, 4))
    assert all(p.isfinite().all() for p in params.values())
    again = EVERY[name](params.items())
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped() == {"a.weight": 1}


def test_the_largest_gradients_do_not_overflow_a_shared_moment() -> None:
    """Just below the limit, all at once, over dimensions and blocks as wide as they get here."""
    p = torch.nn.Parameter(torch.zeros(2000, 2000))
    p.grad = torch.full_like(p, 2.0**48)
    for optimizer in (optim.SlimAdam([("w", p)], rules={"w": [0, 1]}), optim.FOAM([p], level=16), optim.AdamW([p])):
        before = p.detach().clone()
        optimizer.step()
        assert optimizer.skipped() == {}
        assert bool(p.isfinite().all())
        assert bool((p < before).all())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_any_scale_of_gradients_is_finite(name: str, scale: float) -> None:
    params = parameters()
    optimizer = EVERY[name](params.items())
    for step in range(6):
        for k, g in gradients(step).items():
            params[k].grad = g * scale
        optimizer.step()
    assert all(p.isfinite().all() for p in params.values())
    assert optimizer.skipped() == {}


@pytest.mark.parametrize("name", EVERY)
def test_zero_gradients_move_weights_by_decay_only(name: str) -> None:
    """Zero states stay exactly zero: no code, no scale, no residual comes out of nothing."""
    params = parameters()
    optimizer = EVERY[name](params.items())
    start = {k: p.detach().clone() for k, p in params.items()}
    for _ in range(5):
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    # FOAM, LoRAPre ...: decay is a positive factor, so signs stay and magnitudes never grow; L2 decay is a gradient.
    if name == "adam":
        return
    for k, p in params.items():
        assert bool((p.detach().abs() <= start[k].abs()).all())
        assert bool((p.detach().sign() == start[k].sign()).all())
        for state, encoded in optimizer.state[p].items():
            if state in ("exp_avg", "exp_avg_sq", "momentum_buffer") and name != "sgd":
                assert not encoded.decode().any(), (k, state)
