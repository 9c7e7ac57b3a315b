"""Split master weights: exact where they promise it, unbiased where they round, visible where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from statecodec import optim
from statecodec.errors import OptimizerError
from statecodec.kernels.cpu import steps as cpu
from statecodec.kernels.reference import steps as reference
from tests.optim.helpers import gradients, parameters, relative, run


def to_bf16_grid(params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {k: nn.Parameter(p.detach().to(torch.bfloat16).float()) for k, p in params.items()}


@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD, optim.Lion, optim.FOAM, optim.Muon], ids=lambda c: c.__name__)
def test_split32_is_training_in_fp32(make: type[optim.StateOptimizer]) -> None:
    """The same gradients: bf16 parameter plus 16 low bits walk through exactly the weights of an fp32 parameter."""
    wide, split = to_bf16_grid(parameters()), parameters(torch.bfloat16)
    a = make(wide.values(), lr=1e-2)  # type: ignore[call-arg]
    b = make(split.values(), lr=1e-2, master_weights="split32")  # type: ignore[call-arg]
    for step in range(10):
        for k, g in gradients(step, torch.bfloat16).items():
            wide[k].grad, split[k].grad = g.float(), g.clone()
        a.step()
        b.step()
    for k in wide:
        assert torch.equal(b.master_weight(split[k]), wide[k].detach()), k
        assert (split[k].detach().float() - wide[k].detach()).abs().max() <= wide[k].detach().abs().max() * 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_split24_follows_fp32_closely_and_plain16_does_not(dtype: torch.dtype) -> None:
    wide = {k: nn.Parameter(p.detach().to(dtype).float()) for k, p in parameters().items()}
    split, plain = parameters(dtype), parameters(dtype)
    run(optim.AdamW(wide.values(), lr=1e-4), wide, range(50))
    optimizer = optim.AdamW(split.values(), lr=1e-4)
    start = {k: optimizer.master_weight(p) for k, p in split.items()}
    run(optimizer, split, range(50))
    run(optim.AdamW(plain.values(), lr=1e-4, master_weights=None), plain, range(50))
    for k in wide:
        moved = wide[k].detach() - start[k]
        assert relative(optimizer.master_weight(split[k]) - start[k], moved) < 0.02, k
    lost = relative(
        plain["a.weight"].detach().float() - start["a.weight"], wide["a.weight"].detach() - start["a.weight"]
    )
    assert lost > 0.05


def decay(lr: float, steps: int, **options: object) -> float:
    """Pure decay (zero gradients): how much of the asked-for decay happened, on average."""
    p = nn.Parameter((torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.01).to(torch.bfloat16))
    optimizer = optim.AdamW([p], lr=lr, weight_decay=0.1, **options)  # type: ignore[arg-type]
    start = optimizer.master_weight(p)
    p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    asked = 1 - (1 - lr * 0.1) ** steps
    return float(((start - optimizer.master_weight(p)) / start).double().mean()) / asked


def test_stochastic_rounding_lets_small_decay_through() -> None:
    lr = 5e-5  # lr * weight_decay = 5e-6: below the grid of 24 bits
    assert decay(lr, 40) == 0.0
    assert decay(lr, 40, stochastic_rounding=True) == pytest.approx(1.0, abs=0.02)
    assert decay(lr, 40, stochastic_rounding=True, master_weights=None) == pytest.approx(1.0, abs=0.35)
    assert decay(lr, 40, master_weights="split32") == pytest.approx(1.0, abs=0.02)


def test_the_dither_is_drawn_from_seed_parameter_step_and_element_only() -> None:
    def step(seed: int, shape: tuple[int, ...]) -> Tensor:
        p = nn.Parameter(torch.full(shape, 0.3, dtype=torch.bfloat16))
        p.grad = torch.zeros_like(p)
        optimizer = optim.AdamW([p], lr=1e-5, weight_decay=0.1, stochastic_rounding=True, seed=seed)
        for _ in range(30):
            optimizer.step()
        return optimizer.master_weight(p).view(-1)

    assert torch.equal(step(1, (300, 500)), step(1, (500, 300)))  # tiled differently
    assert not torch.equal(step(1, (300, 500)), step(2, (300, 500)))


@pytest.mark.parametrize("drop", [8, 16])
def test_dither_is_unbiased_on_the_grid_and_equal_across_backends(drop: int) -> None:
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 10
    values[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 3.4e38, -1e-42])
    results = []
    for module in (cpu, reference):
        x = values.clone()
        module.dither(x, drop=drop, seed=5, index=3, step=9, start=2**32 - 1000)
        results.append(x)
    assert torch.equal(results[0].view(torch.int32), results[1].view(torch.int32))
    rounded, exact = results[0][6:].double(), values[6:].double()
    assert bool(((results[0][6:].view(torch.int32) & ((1 << drop) - 1)) == 0).all())
    assert float((rounded - exact).abs().div(exact.abs()).max()) < 2.0 ** (drop - 23)
    assert abs(float(((rounded - exact) / exact).mean())) < 2.0 ** (drop - 23) * 0.01
    assert torch.equal(results[0][:4].nan_to_num(), values[:4].nan_to_num())


def test_setting_a_master_weight_loses_only_what_the_split_loses() -> None:
    p = nn.Parameter(torch.zeros(30, 7, dtype=torch.bfloat16))
    optimizer = optim.AdamW([p])
    exact = torch.randn(30, 7)
    optimizer.set_master_weight(p, exact)
    assert 0 < relative(optimizer.master_weight(p), exact) < 2.0**-16
    assert relative(p, exact) > 1e-4
    with pytest.raises(OptimizerError, match=r"\(7, 30\)"):
        optimizer.set_master_weight(p, exact.T)


def test_options_that_do_not_fit_are_refused() -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    with pytest.raises(OptimizerError, match="bf16"):
        optim.AdamW([p], stochastic_rounding=True)
    with pytest.raises(OptimizerError, match="split48"):
        optim.AdamW([p], master_weights="split48")
