"""Matrices of one shape are stepped as one batch, and a step never waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from statecodec import kernels, optim
from statecodec.optim import matrices
from statecodec.optim.muon import newton_schulz
from tests.optim.helpers import bits, relative

Make = Callable[..., optim.StateOptimizer]
EVERY: dict[str, tuple[Make, dict[str, Any]]] = {
    "muon": (optim.Muon, {}),
    "muon-dense": (optim.Muon, {"moments": "dense", "nesterov": False}),
    "muon-cast": (optim.Muon, {"moments": "cast", "maximize": True}),
    "muon-stochastic": (optim.Muon, {"stochastic_rounding": True, "seed": 3}),
    "lorapre": (optim.LoRAPre, {"rank": 4}),
    "lorapre-paper": (optim.LoRAPre, {"rank": 4, "variant": "paper"}),
    "lorapre-matched": (optim.LoRAPre, {"rank": 4, "bias_correction": "matched"}),
    "lorapre-muon": (optim.LoRAPre, {"rank": 4, "base": "muon"}),
}
SHAPES = [(24, 70), (24, 70), (70, 24), (24, 70), (6, 5, 3, 3), (6, 5, 3, 3)]


class Silent:
    """Kernels of a device that is not there; what they would ask of it is asked as the real ones do."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from statecodec.kernels.triton.runtime import flag_word, flags_on_host

        if name.startswith("decode"):
            return lambda *args, **options: None
        return lambda x, *args, **options: flags_on_host(flag_word(x))


def matrix_params(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in SHAPES]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_step_never_waits_for_the_gpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values: whatever asks for one fails, where on a GPU it would wait."""
    make, options = EVERY[name]
    if dtype == torch.float16 and "stochastic" in name:
        pytest.skip("stochastic rounding is for bf16")
    monkeypatch.setattr(kernels, "resolve", lambda name, device: Silent())
    params = [nn.Parameter(torch.zeros(s, dtype=dtype, device="meta")) for s in SHAPES]
    optimizer = make(params, lr=1e-2, weight_decay=0.1, dense_below=0, fused=False, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.skipped()


def test_newton_schulz_is_in_bf16_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[torch.dtype]()
    product = torch.baddbmm
    monkeypatch.setattr(
        torch, "baddbmm", lambda x, *args, **options: seen.append(x.dtype) or product(x, *args, **options)
    )
    for device, expected in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        with FakeTensorMode():
            assert newton_schulz(torch.zeros(3, 8, 16, device=device), 1).dtype == torch.float32
        assert set(seen) == {expected}
        seen.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_batch_is_what_its_matrices_are_alone(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different gradients, missing ones, a bad one: matrices do not see each other."""
    make, options = EVERY[name]
    results = []
    for elements in (matrices.ELEMENTS, 1):
        monkeypatch.setattr(matrices, "ELEMENTS", elements)
        params = matrix_params(dtype)
        optimizer = make(params, lr=1e-2, weight_decay=0.1, dense_below=0, **options)
        for step in range(4):
            for i, p in enumerate(params):
                generator = torch.Generator().manual_seed(10 * step + i)
                p.grad = None if (step, i) == (1, 3) else torch.randn(p.shape, generator=generator).to(dtype)
                if (step, i) == (2, 1):
                    p.grad[0, 0] = torch.nan
            optimizer.step()
        results.append((optimizer, params))
    (one, a), (other, b) = results
    assert one.skipped() == other.skipped() == {1: 1}
    for p, q in zip(a, b, strict=True):
        # A product of many may add up in another order than one alone: a code or a draw may then be another.
        assert relative(one.master_weight(p), other.master_weight(q)) < 2e-3
        assert bits(one.state[p]["step"]) == bits(other.state[q]["step"])


def test_products_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three matrices of one shape, one of another, two convolution kernels: three chains of products.

    Batches are limited in size.
    """
    seen = list[tuple[int, ...]]()

    def noted(x: Tensor, *args: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return newton_schulz(x, *args)

    monkeypatch.setattr("statecodec.optim.muon.newton_schulz", noted)
    params = matrix_params(torch.float32)
    for elements, expected in (
        (matrices.ELEMENTS, [(3, 24, 70), (1, 70, 24), (2, 6, 45)]),
        (2 * 24 * 70, [(2, 24, 70), (1, 24, 70), (1, 70, 24), (2, 6, 45)]),
    ):
        monkeypatch.setattr(matrices, "ELEMENTS", elements)
        seen.clear()
        for p in params:
            p.grad = torch.ones_like(p)
        optim.Muon(params).step()
        assert seen == expected


def test_a_batch_of_muon_is_torchs() -> None:
    """torch.optim.Muon orthogonalises in bf16; everything around it is the same, so only that may differ."""
    ours, theirs = ([nn.Parameter(p.detach()) for p in matrix_params(torch.float32)[:4]] for _ in range(2))
    start = [p.detach().clone() for p in ours]
    options = {"lr": 1e-2, "momentum": 0.95, "nesterov": True, "weight_decay": 0.1, "ns_steps": 5}
    a = optim.Muon(ours, moments="dense", **options)
    b = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(8):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, s in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() <= 0.03 * (q - s).norm()


@pytest.mark.parametrize("name", ["muon", "lorapre"])
def test_an_lr_that_is_a_tensor(name: str) -> None:
    make, options = EVERY[name]
    results = []
    for lr in (torch.tensor(1e-2), float(torch.tensor(1e-2))):
        params = matrix_params(torch.float32)
        optimizer = make(params, lr=lr, weight_decay=0.1, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(params)
    assert all(relative(p, q) < 1e-6 for p, q in zip(*results, strict=True))


def test_a_weight_that_would_overflow_keeps_its_matrix() -> None:
    p = nn.Parameter(torch.full((8, 8), 65000.0, dtype=torch.float16))
    optimizer = optim.Muon([p], lr=1e4, weight_decay=0.0)
    p.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).half()
    optimizer.step()
    assert bool((p == 65000.0).all())
    assert optimizer.skipped() == {0: 1}
    assert not optimizer.state[p]["momentum_buffer"].decode().any()
