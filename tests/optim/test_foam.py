"""FOAM's invariants (docs/optimizers.md): where it is Adam, what it stores, how large a step can be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from statecodec import optim
from statecodec.codecs import Folded
from tests.optim.helpers import gradients, parameters, relative, run

MATRICES = ("a.weight", "b.weight", "conv.weight")


@pytest.mark.parametrize("variant", ["safe", "official"])
def test_level_zero_is_adam(variant: str) -> None:
    """alpha = 1, no decay: `safe` to rounding, `official` up to where eps stands."""
    a, b = parameters(), parameters()
    run(optim.FOAM(a.items(), lr=1e-2, level=0, scale=1.0, variant=variant), a, range(50))
    run(torch.optim.Adam(b.values(), lr=1e-2), b, range(50))
    start = parameters()
    bound = 1e-5 if variant == "safe" else 1e-3
    assert all(relative(a[k] - start[k], b[k] - start[k]) < bound for k in a)


@pytest.mark.parametrize("level", [1, 2, 4])
def test_block_constant_gradients_are_adam(level: int) -> None:
    a, b = (nn.Parameter(torch.zeros(6, 10)) for _ in range(2))
    foam, adam = optim.FOAM([a], lr=1e-2, level=level, scale=1.0), torch.optim.Adam([b], lr=1e-2)
    for step in range(30):
        blocks = torch.randn(6, -(-10 // 2**level), generator=torch.Generator().manual_seed(step))
        a.grad = b.grad = blocks.repeat_interleave(2**level, -1)[:, :10].contiguous()
        foam.step()
        adam.step()
    assert relative(a, b) < 1e-6


def test_a_constant_gradient_moves_a_short_tail_like_the_rest() -> None:
    """Rows of 10 in blocks of 4: the published code moves the tail by 0.348 lr at first and 0.83 lr at step 300."""
    moves = {}
    for variant in ("safe", "official"):
        p = nn.Parameter(torch.zeros(3, 10))
        optimizer = optim.FOAM([p], lr=1.0, level=2, scale=1.0, variant=variant)
        steps = []
        for _ in range(300):
            before = p.detach().clone()
            p.grad = torch.ones(3, 10)
            optimizer.step()
            steps.append(before - p.detach())
        moves[variant] = [(float(s[0, 0]), float(s[0, 9])) for s in (steps[0], steps[-1])]
    assert moves["safe"] == [(pytest.approx(1, abs=1e-5),) * 2, (pytest.approx(1, abs=1e-4),) * 2]
    (_, first), (_, last) = moves["official"]
    assert first == pytest.approx(0.348, abs=1e-3)
    assert last == pytest.approx(0.827, abs=0.01)


@pytest.mark.parametrize("level", [0, 1, 2, 3, 9])
def test_states_are_folded_and_blocks_no_wider_than_a_row(level: int) -> None:
    params = parameters()
    optimizer = optim.FOAM(params.items(), level=level)
    run(optimizer, params, range(2))
    for name in MATRICES:
        p = params[name]
        encoded = optimizer.state[p]["exp_avg"]
        rows, cols = p.shape[0], p.numel() // p.shape[0]
        assert isinstance(encoded.codec, Folded)
        assert encoded.codec.block // 2 < cols
        assert encoded.parts["mean.data"].numel() == rows * -(-cols // encoded.codec.block)
    for name in ("a.bias", "embed.weight"):
        assert optimizer.state[params[name]]["exp_avg"].codec.name == "raw"


def test_the_step_is_bounded() -> None:
    """|update| <= c_t alpha lr (|m| + |R|) / sqrt(v + R**2): checked from the stored states, in the published form."""
    params = parameters()
    optimizer = optim.FOAM(params.items(), lr=1.0, betas=(0.9, 0.95), level=2, scale=0.25, variant="official")
    for step in range(20):
        before = {k: params[k].detach().clone() for k in MATRICES}
        run(optimizer, params, range(step, step + 1))
        c = (1 - 0.95 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
        for k in MATRICES[:2]:
            g, state = gradients(step)[k].double(), optimizer.state[params[k]]
            m, v = (state[s].decode().double() for s in ("exp_avg", "exp_avg_sq"))
            cols = g.shape[1]
            blocks = torch.nn.functional.pad(g, (0, -cols % 4)).view(g.shape[0], -1, 4).mean(-1)
            rest = g - blocks.repeat_interleave(4, -1)[:, :cols]
            bound = c * 0.25 * (m.abs() + rest.abs()) / (v + rest**2).sqrt()
            assert bool(((before[k] - params[k].detach()).double().abs() <= bound * 1.0001 + 1e-6).all())


def test_exemption_by_name_and_by_group() -> None:
    params = parameters()
    optimizer = optim.FOAM(
        [{"params": [params["a.weight"]], "matrix": False}, {"params": [params["embed.weight"]], "matrix": True}]
    )
    for k in ("a.weight", "embed.weight"):
        params[k].grad = gradients(0)[k]
    optimizer.step()
    assert optimizer.state[params["a.weight"]]["exp_avg"].codec.name == "raw"
    assert optimizer.state[params["embed.weight"]]["exp_avg"].codec.name == "folded"
