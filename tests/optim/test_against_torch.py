"""With dense moments, AdamW, Adam, SGD and Muon are torch.optim's, to rounding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from statecodec import optim
from tests.optim.helpers import gradients, parameters, relative, run


def compare(ours: Any, theirs: Any, dtype: torch.dtype, tolerance: float, steps: int = 30) -> None:
    a, b = parameters(dtype), parameters(dtype)
    run(ours(a.values()), a, range(steps))
    run(theirs(b.values()), b, range(steps))
    start = parameters(dtype)
    for k in a:
        moved, error = (b[k] - start[k]).norm(), (a[k] - b[k]).norm()
        assert moved > 0
        assert error <= tolerance * moved, (k, float(error / moved))


DTYPES = [pytest.param(torch.float32, 2e-6, id="fp32"), pytest.param(torch.float64, 1e-13, id="fp64")]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [(optim.AdamW, torch.optim.AdamW), (optim.Adam, torch.optim.Adam)])
def test_adam(
    ours: Any, theirs: Any, maximize: bool, weight_decay: float, dtype: torch.dtype, tolerance: float
) -> None:
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": weight_decay, "maximize": maximize}
    compare(lambda p: ours(p, moments="dense", **options), lambda p: theirs(p, **options), dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)]
)
def test_sgd(momentum: float, dampening: float, nesterov: bool, dtype: torch.dtype, tolerance: float) -> None:
    options = {"lr": 1e-2, "momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": 0.01}
    compare(
        lambda p: optim.SGD(p, moments="dense", **options), lambda p: torch.optim.SGD(p, **options), dtype, tolerance
    )


def test_sgdw_without_decay_is_sgd_and_its_decay_is_decoupled() -> None:
    compare(
        lambda p: optim.SGDW(p, lr=1e-2, momentum=0.9, moments="dense"),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), torch.float32, 2e-6,
    )  # fmt: skip
    p = nn.Parameter(torch.full((8,), 2.0))
    p.grad = torch.zeros(8)
    optim.SGDW([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    assert torch.equal(p.detach(), torch.full((8,), 2.0 * (1 - 0.05)))


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon(adjust: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon orthogonalises in bf16; everything around it is the same, so only that may differ."""
    a, b = (nn.Parameter(torch.randn(40, 24, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    options = {"lr": 1e-2, "momentum": 0.95, "nesterov": nesterov, "weight_decay": 0.1, "ns_steps": 5}
    ours = optim.Muon([a], moments="dense", adjust=adjust, **options)
    theirs = torch.optim.Muon([b], adjust_lr_fn=adjust, **options)
    start = a.detach().clone()
    for step in range(10):
        a.grad = b.grad = gradients(step)["b.weight"]
        ours.step()
        theirs.step()
    assert (a - b).norm() <= 0.03 * (b - start).norm()


def test_per_group_options_and_schedule_follow_torch() -> None:
    def groups(p: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        names = list(p)
        return [{"params": [p[names[0]]], "weight_decay": 0.3}, {"params": [p[n] for n in names[1:]], "lr": 3e-3}]

    a, b = parameters(), parameters()
    for cls, p in ((optim.AdamW, a), (torch.optim.AdamW, b)):
        options = {"moments": "dense"} if cls is optim.AdamW else {}
        optimizer = cls(groups(p), lr=1e-2, **options)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
        for step in range(20):
            run(optimizer, p, range(step, step + 1))
            schedule.step() if step < 19 else None
    assert all(relative(a[k], b[k]) < 1e-5 for k in a)


def test_tensor_lr() -> None:
    a, b = parameters(), parameters()
    run(optim.AdamW(a.values(), lr=torch.tensor(1e-2), moments="dense"), a, range(5))
    run(optim.AdamW(b.values(), lr=float(torch.tensor(1e-2)), moments="dense"), b, range(5))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_non_contiguous_parameters_and_gradients() -> None:
    """A channels-last kernel and a transposed gradient step like their contiguous twins."""
    for moments in ("dense", "companded8"):
        a, b = parameters(), parameters()
        a["conv.weight"] = nn.Parameter(a["conv.weight"].detach().to(memory_format=torch.channels_last))
        ours = optim.AdamW(a.values(), lr=1e-2, moments=moments, dense_below=0)
        theirs = optim.AdamW(b.values(), lr=1e-2, moments=moments, dense_below=0)
        for step in range(5):
            for k, g in gradients(step).items():
                a[k].grad, b[k].grad = (g.T.contiguous().T if g.ndim == 2 else g.clone()), g.clone()
            ours.step()
            theirs.step()
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert a["conv.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.05), (4, 0.45)])
def test_companded_moments_stay_close_to_dense_ones(bits: int, bound: float) -> None:
    start, exact, small = parameters(), parameters(), parameters()
    moments = {
        "exp_avg": f"companded(bits={bits},group=32)",
        "exp_avg_sq": f"companded(curve=sqrt,bits={bits},group=32)",
    }
    run(optim.AdamW(exact.values(), lr=1e-3, moments="dense"), exact, range(50))
    run(optim.AdamW(small.values(), lr=1e-3, moments=moments, dense_below=0), small, range(50))
    for k in start:
        assert 0 < relative(small[k] - start[k], exact[k] - start[k]) < bound, k


def test_every_pair_of_steps_backends_agrees() -> None:
    """The compiled arithmetic of CPUs against the reference, on decoded values of awkward shapes."""
    from statecodec.kernels.cpu import steps as cpu
    from statecodec.kernels.reference import steps as reference

    common = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "c1": 0.271, "c2": 0.0297, "decay": 0.999}
    flags = [dict(zip(("mean_of_squares", "true_tail", "torch_bias", "decay_first"), v, strict=True))
             for v in itertools.product((False, True), repeat=4)]  # fmt: skip
    cases: list[tuple[str, int, dict[str, Any]]] = [("adam", 1, common)]
    cases += [
        ("foam", block, {**common, "block": block, "scale": 0.5, "residual": 0.7, **f})
        for block in (1, 4)
        for f in flags
    ]
    cases += [("lion", 1, {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "decay": 0.9})]
    sgd = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "decay": 0.9}
    cases += [("sgd", 1, {**sgd, "nesterov": n, "first": f}) for n in (False, True) for f in (False, True)]
    generator = torch.Generator().manual_seed(0)
    for name, block, scalars in cases:
        w, g = (torch.randn(7, 13, generator=generator) for _ in range(2))
        folded = (7, -(-13 // block))
        m, v = torch.randn(folded, generator=generator), torch.rand(folded, generator=generator)
        moments = (m, v) if name in ("adam", "foam") else (m,)
        results = []
        for module in (cpu, reference):
            tensors = [x.clone() for x in (w, g, *moments)]
            getattr(module, name)(*tensors, **scalars)
            results.append(tensors)
        for ours, theirs in zip(*results, strict=True):
            assert relative(ours, theirs) < 1e-6, (name, scalars)
