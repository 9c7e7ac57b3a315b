"""Fused steps against the generic path (decode, `cpu.steps`, encode) that defines them.

Bit-exact for Adam, Lion and SGD in the interpreter. On a GPU the generic path's own torch operations contract and sum
in their own order, so the oracle stays on the CPU and the results are carried there. FOAM's block sums and SlimAdam's
means are added up in another order than on the CPU: those are compared within a few roundings, and codes within one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statecodec import optim
from statecodec.codecs import EncodedTensor

SHAPES = [(24, 256), (5, 7), (33,), (3, 100), (128,), (2, 4, 50), ()]
Gradients = Callable[[int, int, tuple[int, ...]], Tensor | None]

ADAM: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (optim.AdamW, ADAM),
    "adam": (optim.Adam, ADAM),
    "lion": (optim.Lion, {"lr": 1e-3, "weight_decay": 0.1}),
    "sgd": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-2}),
    "nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "plain": (optim.SGD, {"lr": 0.1}),
    "sgdw": (optim.SGDW, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
}
NIBBLES = {"exp_avg": "companded(bits=4,group=64)", "exp_avg_sq": "companded(curve=log,bits=4,group=64)"}
STORED: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32-dense": (torch.float32, {"moments": "dense", "maximize": True}),
    "bf16": (torch.bfloat16, {"master_weights": None}),
    "bf16-stochastic": (torch.bfloat16, {"master_weights": None, "stochastic_rounding": True, "seed": 3}),
    "bf16+8": (torch.bfloat16, {"master_weights": "split24"}),
    "bf16+8-stochastic": (torch.bfloat16, {"master_weights": "split24", "stochastic_rounding": True, "seed": 5}),
    "bf16+16": (torch.bfloat16, {"master_weights": "split32"}),
    "fp16": (torch.float16, {"master_weights": None, "moments": "dense"}),
    "fp16+8": (torch.float16, {"master_weights": "split24"}),
    "fp16+16": (torch.float16, {"master_weights": "split32"}),
}
CASES = [
    (rule, stored)
    for rule in RULES
    for stored in STORED
    if rule == "adamw" or stored in ("fp32", "bf16+8", "fp32-dense")
]


def usual(k: int, i: int, shape: tuple[int, ...]) -> Tensor:
    """The gradient of parameter i at step k: seven orders of magnitude, and one NaN."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(100 * k + i)) * 10.0**-i
    if (k, i) == (1, 1):
        g.view(-1)[-1] = torch.nan
    return g


def train(
    make: Any, device: torch.device, dtype: torch.dtype, fused: bool, *, shapes: Sequence[tuple[int, ...]] = SHAPES,
    steps: int = 3, gradients: Gradients = usual, **options: Any,
) -> tuple[optim.StateOptimizer, list[nn.Parameter]]:  # fmt: skip
    """Step a few parameters; the generic path runs on the CPU, the fused one on `device`."""
    place = device if fused else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    params = [(f"layer{i}.q_proj.weight", nn.Parameter(w.to(place))) for i, w in enumerate(weights)]
    optimizer = make(params, fused=fused, **{"dense_below": 0, **options})
    for k in range(steps):
        for i, (_, p) in enumerate(params):
            g = gradients(k, i, tuple(p.shape))
            p.grad = None if g is None else _like(g, p)
        optimizer.step()
    return optimizer, [p for _, p in params]


def _like(g: Tensor, p: Tensor) -> Tensor:
    return g.to(p.dtype).to(p.device)  # keeps the strides


def differences(a: Any, b: Any) -> list[str]:
    """Where two training runs differ in any bit: weights, states, counters."""
    found = []
    for i, (p, q) in enumerate(zip(a[1], b[1], strict=True)):
        pairs = {"weight": (p.detach(), q.detach())}
        for name, value in a[0].state[p].items():
            other = b[0].state[q][name]
            if isinstance(value, EncodedTensor):
                pairs |= {f"{name}.{part}": (x, other.parts[part]) for part, x in value.parts.items()}
            else:
                pairs[name] = (value, other)
        for name, (x, y) in pairs.items():
            wrong = (_bytes(x) != _bytes(y)).sum().item()
            if wrong:
                found.append(f"parameter {i} {tuple(p.shape)}: {wrong} bytes of {name}")
    return found


def _bytes(x: Tensor) -> Tensor:
    return x.cpu().contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(params=["one tile each", "many tiles"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small tiles, probes and look-ahead in the second variant, so that waits and interleaving are exercised."""
    from statecodec.kernels.triton import plan

    monkeypatch.setattr(plan, "_PLANS", type(plan._PLANS)())
    if request.param == "many tiles":
        for name, size in (
            ("UPDATE_TILE", 1024),
            ("PROBE_TILE", 512),
            ("PROBE_CHUNKS", 2),
            ("RUN", 2),
            ("AHEAD", 3000),
        ):
            monkeypatch.setattr(plan, name, size)
    return str(request.param)


@pytest.mark.parametrize(("rule", "stored"), CASES, ids=[f"{r}-{s}" for r, s in CASES])
def test_equals_the_generic_path(rule: str, stored: str, device) -> None:
    make, options = RULES[rule]
    dtype, storage = STORED[stored]
    generic = train(make, device, dtype, False, **options, **storage)
    fused = train(make, device, dtype, True, **options, **storage)
    assert differences(generic, fused) == []
    assert fused[0].skipped() == {"layer1.q_proj.weight": 1}


def test_whatever_the_tiling(tiling: str, device) -> None:
    shapes = [(40, 128), (7, 90), (3000,), (64, 64), (5, 1), (2, 300)]
    for options in ({"master_weights": "split24"}, {"moments": NIBBLES}):
        generic, fused = (
            train(optim.AdamW, device, torch.bfloat16, f, shapes=shapes, **options) for f in (False, True)
        )
        assert differences(generic, fused) == []


def test_missing_and_awkward_gradients(device) -> None:
    """No gradient, a transposed one, an expanded one, one that moves."""

    def gradients(k: int, i: int, shape: tuple[int, ...]) -> Tensor | None:
        g = usual(0, i + k, shape)
        if (k + i) % 5 == 4:
            return None
        if i == 0 and k == 1:
            return g.t().contiguous().t()
        return torch.ones(()).expand(shape) if i == 3 else g

    generic, fused = (
        train(optim.AdamW, device, torch.bfloat16, f, gradients=gradients, steps=4) for f in (False, True)
    )
    assert differences(generic, fused) == []


def test_unaligned_parameters(device) -> None:
    """Views that start anywhere: no wide accesses, the same numbers."""

    def views(params: Any, **options: Any) -> optim.StateOptimizer:
        memory = torch.zeros(5000, dtype=torch.bfloat16, device=params[0][1].device)
        at = 3
        for _, p in params:
            with torch.no_grad():
                p.set_(memory[at : at + p.numel()].view(p.shape).copy_(p))
            at += p.numel() + 1
        return optim.AdamW(params, **options)

    shapes = [(4, 256), (64,), (3, 100)]
    generic, fused = (train(views, device, torch.bfloat16, f, shapes=shapes) for f in (False, True))
    assert differences(generic, fused) == []


def test_narrow_rows_get_their_own_tiles(device, monkeypatch: pytest.MonkeyPatch) -> None:
    from statecodec.kernels.triton import plan

    monkeypatch.setattr(plan, "NARROW", 64)
    shapes = [(300, 3), (64, 8), (50, 1), (4, 256)]
    generic, fused = (train(optim.AdamW, device, torch.bfloat16, f, shapes=shapes) for f in (False, True))
    assert differences(generic, fused) == []


def test_lr_tensor_and_schedule(device) -> None:
    """A learning rate that lives on the device is read there, at every launch."""

    def run(fused: bool) -> Any:
        p = nn.Parameter(torch.ones(4, 64).to(device if fused else "cpu"))
        lr = torch.tensor(0.5, device=p.device)
        optimizer = optim.AdamW([p], lr=lr, fused=fused, dense_below=0)
        for k in range(3):
            p.grad = usual(k, 0, (4, 64)).to(p.device)
            optimizer.step()
            lr.mul_(0.5)
        return optimizer, [p]

    assert differences(run(False), run(True)) == []


def test_one_launch_for_a_group_of_many_tensors(device, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tensors; one more where small ones keep dense moments; the tables are made once."""
    from statecodec.kernels.triton.plan import Plan

    launches, tables = [], []
    launch, write = Plan.launch, Plan._address
    monkeypatch.setattr(
        Plan, "launch", lambda self, slots, hyper: launches.append(len(slots)) or launch(self, slots, hyper)
    )

    def address(self: Plan, slots: Any, grads: Any) -> None:
        before = self.table
        write(self, slots, grads)
        tables.append(self.table is not before)

    monkeypatch.setattr(Plan, "_address", address)
    shapes = [(8, 64), (64,), (70,)] * 20
    params = [nn.Parameter(torch.ones(s, device=device)) for s in shapes]
    for dense_below, expected in ((0, [60]), (100, [20, 40])):
        launches.clear()
        tables.clear()
        optimizer = optim.AdamW(params, fused=True, dense_below=dense_below)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p) if p.grad is None else p.grad
            optimizer.step()
        assert launches == expected * 2
        assert tables == [True] * len(expected) + [False] * len(expected)


def test_dense_states_of_another_dtype_are_refused(device) -> None:
    from statecodec.errors import UsageError
    from statecodec.kernels import triton as backend
    from statecodec.kernels.fused import Hyper, Slot

    x = torch.zeros(4, 8, device=device)
    count = torch.zeros((), device=device)
    slot = Slot(x, x, count, count.clone(), None, {"exp_avg": {"data": x.bfloat16()}}, 0, (4, 8))
    with pytest.raises(UsageError, match="bfloat16"):
        backend.step("lion", [slot], {"exp_avg": {"name": "raw"}}, Hyper(1e-3))
    with pytest.raises(UsageError, match="supports"):
        backend.step("lion", [slot], {"exp_avg": {"name": "cast"}}, Hyper(1e-3))
    backend.step("lion", [], {"exp_avg": {"name": "raw"}}, Hyper(1e-3))


FOLDED: dict[str, dict[str, Any]] = {
    "safe": {"level": 2, "weight_decay": 0.1},
    "official": {"level": 1, "variant": "official", "weight_decay": 0.1},
    "paper": {"level": 3, "variant": "paper"},
    "companded": {"level": 2, "moments": "companded8"},
    "stochastic": {"level": 2, "stochastic_rounding": True},
}
SHARED: dict[str, dict[str, Any]] = {
    "rows": {"rules": {"*": [1]}},
    "columns": {"rules": {"*": [0]}, "maximize": True},
    "all": {"rules": {"*": [0, 1]}, "moments": "companded8"},
    "stochastic": {"rules": {"*": [1]}, "stochastic_rounding": True},
}
MATRICES = [(24, 256), (6, 50), (3, 130), (150, 70)]


@pytest.mark.parametrize("stored", ["fp32", "bf16+8"])
@pytest.mark.parametrize(
    ("make", "options"),
    [*((optim.FOAM, o) for o in FOLDED.values()), *((optim.SlimAdam, o) for o in SHARED.values())],
    ids=[*(f"foam-{k}" for k in FOLDED), *(f"slim-{k}" for k in SHARED)],
)
def test_foam_and_slimadam(make: Any, options: dict[str, Any], stored: str, device) -> None:
    """Sums are added in another order than on the CPU: fp32 roundings apart, which may move a code by one."""
    dtype, storage = STORED[stored]
    shapes = [*MATRICES, (5, 6, 3, 3)] if make is optim.SlimAdam else MATRICES
    (a, params), (b, others) = (
        train(make, device, dtype, f, shapes=shapes, steps=2, **storage, **options) for f in (False, True)
    )
    assert a.skipped() == b.skipped() == {"layer1.q_proj.weight": 1}
    for p, q in zip(params, others, strict=True):
        close = torch.isclose(a.master_weight(p), b.master_weight(q).cpu(), rtol=1e-5, atol=1e-6)
        assert close.float().mean() > 0.998  # a code apart, or a draw apart, is a visible step for few elements
        for name in ("exp_avg", "exp_avg_sq"):
            first, second = a.state[p][name], b.state[q][name]
            error = (first.decode() - second.decode().cpu()).abs().max()
            coded = any("codes" in part for part in first.parts)
            assert error <= (0.02 if coded else 5e-7) * first.decode().abs().max()


def test_foam_level_one_is_exact(device) -> None:
    generic, fused = (
        train(optim.FOAM, device, torch.bfloat16, f, shapes=MATRICES, level=1, moments="companded8")
        for f in (False, True)
    )
    assert differences(generic, fused) == []


def test_schedule_covers_everything_in_order() -> None:
    from statecodec.kernels.triton.schedule import schedule

    probes, updates, nbytes = [3, 1, 1, 7, 1], [5, 0, 2, 11, 1], [600, 0, 50, 5000, 10]
    for ahead in (0, 100, 10**9):
        items = [tuple(x) for part in schedule(probes, updates, nbytes, ahead) for x in part.tolist()]
        assert len(items) == len(set(items)) == sum(probes) + sum(updates)
        for slot in range(5):
            mine = [work for s, work in items if s == slot]
            assert sorted(-1 - w for w in mine if w < 0) == list(range(probes[slot]))
            assert sorted(w for w in mine if w >= 0) == list(range(updates[slot]))
            assert all(w < 0 for w in mine[: probes[slot]]), "an update waits for its probes: they must come first"


def test_what_is_not_supported() -> None:
    from statecodec.kernels import triton as backend

    eight = {"name": "companded", "curve": "softsign", "bits": 8, "group": 32, "steps": 0}
    wide = {**eight, "group": 64}
    assert backend.supports("adam", {"exp_avg": eight, "exp_avg_sq": eight}, torch.bfloat16, torch.int8)
    assert not backend.supports("adam", {"exp_avg": eight, "exp_avg_sq": wide}, torch.bfloat16, torch.int8)
    assert not backend.supports("adam", {"exp_avg": eight}, torch.bfloat16, torch.int8)
    assert not backend.supports("adam", {"exp_avg": eight, "exp_avg_sq": eight}, torch.float64, None)
    assert not backend.supports("adam", {"exp_avg": {"name": "cast"}, "exp_avg_sq": eight}, torch.float32, None)
    assert not backend.supports("lorapre", {}, torch.float32, None)


@pytest.mark.gpu
def test_cuda_graph(device) -> None:
    """A captured step, replayed, is the step."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")

    def build() -> tuple[optim.StateOptimizer, list[nn.Parameter]]:
        params = [nn.Parameter(torch.ones(s, device=device, dtype=torch.bfloat16)) for s in ((64, 256), (33,), (5, 70))]
        for i, p in enumerate(params):
            p.grad = usual(0, i + 2, tuple(p.shape)).to(device, torch.bfloat16)
        lr = torch.tensor(1e-2, device=device)
        return optim.AdamW(params, lr=lr, fused=True, dense_below=0), params

    eager, captured = build(), build()
    for _ in range(7):
        eager[0].step()
    captured[0].step()
    captured[0].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured[0].step()
    for _ in range(5):
        graph.replay()
    assert differences(eager, captured) == []
