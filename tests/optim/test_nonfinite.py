"""One policy for all: the smallest unit that shares a stored number keeps its old bytes, to the bit, and is counted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from statecodec import optim
from statecodec.codecs import EncodedTensor
from tests.optim.helpers import EVERY, SHAPES, bits, gradients, parameters, run

BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "square overflows": 1e25}

# Which elements of a 24 x 70 matrix share a stored number with element (3, 5), where it is not this element alone.
ROWS, COLS = 24, 70
GROUP, MATRIX = (slice(3, 4), slice(0, 32)), (slice(0, ROWS), slice(0, COLS))
UNITS = {
    "adamw-dense": (slice(3, 4), slice(5, 6)),
    "adamw-log4": (slice(3, 4), slice(0, COLS)),  # groups of 32 and 128
    "sgd-plain": (slice(3, 4), slice(5, 6)),
    "foam": (slice(3, 4), slice(4, 8)),
    "foam-companded": (slice(3, 4), slice(0, 64)),  # 32 blocks of 2
    "slimadam": (slice(0, ROWS), slice(5, 6)),
    "slimadam-companded": (slice(3, 4), slice(0, COLS)),
    "lorapre": MATRIX,
    "lorapre-paper": MATRIX,
    "lorapre-muon": MATRIX,
    "muon": MATRIX,
}
# How many units that makes: SlimAdam's mean of a column stands for elements, its mean of a row for three groups.
COUNTS = {"slimadam": ROWS, "slimadam-companded": 3}


def values(optimizer: optim.StateOptimizer, p: Tensor) -> dict[str, Tensor]:
    """The weight and every elementwise state of a parameter, decoded to its shape."""
    found = {"weight": optimizer.master_weight(p)}
    for k, state in optimizer.state[p].items():
        if isinstance(state, EncodedTensor) and k != "weight_low" and state.codec.name != "lowrank":
            found[k] = state.decode().view(p.shape)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", EVERY)
def test_a_bad_gradient_stops_its_own_unit_only(name: str, bad: str, dtype: torch.dtype) -> None:
    if bad == "square overflows" and name in ("sgd", "sgd-plain", "sgdw", "lion"):
        pytest.skip("nothing is squared, nothing overflows")
    params = parameters(dtype)
    optimizer = EVERY[name](params.items())
    run(optimizer, params, range(2))
    twin, twin_params = copy.deepcopy((optimizer, params))
    run(twin, twin_params, range(2, 3))
    for k, g in gradients(2).items():
        params[k].grad = g.to(dtype)
    params["a.weight"].grad[3, 5] = BAD[bad]
    victim = params["a.weight"]
    before = values(optimizer, victim)
    optimizer.step()
    rows, cols = UNITS.get(name, GROUP)
    after, other = values(optimizer, victim), values(twin, twin_params["a.weight"])
    for k in before:
        expected = other[k].clone()
        expected[rows, cols] = before[k][rows, cols]
        assert bits(after[k]) == bits(expected), k
    assert optimizer.skipped() == {"a.weight": COUNTS.get(name, 1)}
    for k in params.keys() - {"a.weight"}:
        assert bits(params[k]) == bits(twin_params[k]), k
        assert bits(optimizer.state[params[k]]) == bits(twin.state[twin_params[k]]), k
    run(optimizer, params, range(3, 4))
    assert all(p.isfinite().all() for p in params.values())
    again = EVERY[name](params.items())
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped() == optimizer.skipped()


@pytest.mark.parametrize("name", EVERY)
def test_nothing_but_bad_gradients_changes_nothing_but_counts(name: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = EVERY[name](params.items())
    run(optimizer, params, range(2))
    before = {k: values(optimizer, p) for k, p in params.items()}
    for p in params.values():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    for k, p in params.items():
        assert bits(values(optimizer, p)) == bits(before[k]), k
        assert float(optimizer.state[p]["step"]) == 3
        assert float(optimizer.state[p]["skipped"]) > 0


@pytest.mark.parametrize("name", EVERY)
def test_the_reference_path_keeps_the_same_units(name: str) -> None:
    """What GPUs do without a fused step: torch operations instead of the CPU's kernels."""
    results = []
    for backend in ("cpu", "reference"):
        params = parameters(torch.bfloat16)
        optimizer = EVERY[name](params.items())
        optimizer._backend = backend
        run(optimizer, params, range(2))
        before = {k: values(optimizer, p) for k, p in params.items()}
        for k, g in gradients(2).items():
            params[k].grad = g.bfloat16()
            params[k].grad.view(-1)[:: 80 + len(k)] = BAD["-inf" if k == "a.bias" else "nan"]
        optimizer.step()
        after = {k: values(optimizer, p) for k, p in params.items()}
        kept = {(k, s): before[k][s] == after[k][s] for k in params for s in before[k]}
        results.append((optimizer.skipped(), kept))
    (counts, kept), (other_counts, other_kept) = results
    assert counts == other_counts
    assert counts.keys() == SHAPES.keys()
    for k, same in kept.items():
        # Beside what is kept, a step may happen to change nothing; roundings of a code apart, in both alike.
        assert (same == other_kept[k]).float().mean() > 0.98, k


def test_an_fp16_weight_that_would_overflow_stays() -> None:
    p = torch.nn.Parameter(torch.full((64, 64), 65000.0, dtype=torch.float16))
    optimizer = optim.SGD([p], lr=1.0)
    p.grad = torch.zeros_like(p)
    p.grad[0, 0], p.grad[0, 1] = -1000.0, 1000.0
    optimizer.step()
    assert p[0, :3].tolist() == [65000.0 // 32 * 32, 64000.0, 65000.0 // 32 * 32]
    assert optimizer.skipped() == {0: 1}


def test_the_largest_gradients_do_not_overflow_a_shared_moment() -> None:
    """Just below the limit, all at once, over dimensions and blocks as wide as they get here."""
    p = torch.nn.Parameter(torch.zeros(2000, 2000))
    p.grad = torch.full_like(p, 2.0**31)
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
