"""Fused steps against the generic path (decode, `cpu.steps`, encode) that defines them.

Bit-exact, on a GPU too: the generic path's own torch operations contract and sum in their own order there, so the
oracle stays on the CPU and the results are carried there. Only SlimAdam's means are added up in another order than on
the CPU: those are compared within a few roundings, and codes within one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from statecodec import kernels, optim
from statecodec.codecs import Codec, Companded, EncodedTensor, get
from statecodec.errors import InvalidCodec, OptimizerError, UsageError
from statecodec.kernels.curves import Curve
from statecodec.kernels.fused import Slot, StateStorage

# Numbers that are not finite are what some of these tests are about; numpy, under the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

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
    """Small tiles in the second variant, so that there are many chunks, with several tiles and ends in each."""
    from statecodec.kernels.triton import fast, geometry

    if request.param == "many tiles":
        monkeypatch.setattr(geometry, "TILE", 512)
        monkeypatch.setattr(geometry, "RUN", 2)
        monkeypatch.setattr(fast, "COUNT", 8)
        monkeypatch.setattr(fast, "RUN", 3)
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


@pytest.mark.parametrize("master_weights", [None, "split24", "split32"])
@pytest.mark.parametrize("make", [optim.SGD, optim.Lion, optim.FOAM], ids=lambda m: m.__name__)
def test_fp16_weights_that_would_overflow_stay(make: Any, master_weights: str | None, device) -> None:
    """65504 is fp16's largest: a step of 8 and more from there on has nowhere to go."""

    def near_the_end(params: Any, **options: Any) -> optim.StateOptimizer:
        for _, p in params:
            p.data.view(-1)[::40] = 65504.0
        return make(params, lr=1e3, weight_decay=0.0, **options)

    shapes = [(6, 128), (3, 70)]
    generic, fused = (
        train(near_the_end, device, torch.float16, f, shapes=shapes, master_weights=master_weights)
        for f in (False, True)
    )
    assert differences(generic, fused) == []
    assert generic[0].skipped() == fused[0].skipped()
    assert len(fused[0].skipped()) == 2


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


def test_rows_shorter_than_a_group(device) -> None:
    shapes = [(300, 3), (64, 8), (50, 1), (4, 256)]
    generic, fused = (train(optim.AdamW, device, torch.bfloat16, f, shapes=shapes) for f in (False, True))
    assert differences(generic, fused) == []


@pytest.mark.parametrize("lr", [1e-3, "tensor"])
@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD, optim.Lion, optim.FOAM, optim.SlimAdam])
def test_a_fused_step_never_waits_for_the_gpu(make: Any, lr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, without kernels: whatever asks for one fails, where a CUDA graph could not be made."""
    from statecodec.kernels.triton import fast, general, launch, sharing, tables

    class Nothing:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: None

    for module, name in (
        (fast, "step_words"), (general, "step_elements"), (tables, "begin"), (sharing, "squares"), (sharing, "share"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Nothing())
    monkeypatch.setattr(launch, "on", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr("statecodec.optim.options.check_fusable", lambda p: None)
    monkeypatch.setattr("statecodec.optim.base.check_fusable", lambda p: None)
    params = [nn.Parameter(torch.zeros(s, dtype=torch.bfloat16, device="meta")) for s in ((8, 64), (70, 96), (33,))]
    named = [(f"layer{i}.q_proj.weight", p) for i, p in enumerate(params)]
    options = {"rules": {"*": [1]}} if make is optim.SlimAdam else {}
    optimizer = make(named, lr=1e-2, weight_decay=0.1, fused=True, dense_below=100, **options)
    for rate in (1e-2, lr, lr):  # the first step looks at options
        optimizer.param_groups[0]["lr"] = torch.zeros((), device="meta") if rate == "tensor" else rate
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


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


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched, in order."""
    from statecodec.kernels.triton.launch import TritonLaunch

    names = list[str]()
    parts = TritonLaunch._parts

    def noted(self: TritonLaunch, *args: Any) -> Any:
        found = parts(self, *args)
        names.extend(kernel.fn.__name__ for kernel, *_ in found)
        return found

    monkeypatch.setattr(TritonLaunch, "_parts", noted)
    return names


def test_one_launch_for_a_group_of_many_tensors(device, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tensors; more only where storage or alignment differ. Nothing is sent that has not changed."""
    from statecodec.kernels.triton.launch import News

    sent = list[int]()
    send = News.send
    monkeypatch.setattr(News, "send", lambda self, here, *rest: sent.append(len(here)) or send(self, here, *rest))
    shapes = [(8, 64), (64,), (70, 32)] * 4
    params = [nn.Parameter(torch.ones(s, device=device, dtype=torch.bfloat16)) for s in shapes]
    for dense_below, expected in ((0, ["step_words"]), (100, ["step_words", "step_elements"])):
        launched.clear()
        sent.clear()
        optimizer = optim.AdamW(params, fused=True, dense_below=dense_below)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(3):
            optimizer.step()
        assert sorted(launched) == sorted(expected * 3)
        assert len(sent) == len(expected)
        optimizer.param_groups[0]["lr"] = 0.5
        params[3].grad = torch.ones_like(params[3])
        optimizer.step()
        assert len(sent) == 2 * len(expected)


def test_a_gradient_somewhere_else_finds_the_kernel_that_takes_it(device, launched: list[str]) -> None:
    """Freshly allocated, unaligned, in fp32, strided, missing: the same parameter, step after step."""

    def gradients(k: int, i: int, shape: tuple[int, ...]) -> Tensor | None:
        g = usual(k, 0, shape)
        if k == 1:
            return torch.zeros(g.numel() + 1, dtype=torch.bfloat16)[1:].view(shape).copy_(g)
        return g.t().contiguous().t() if k == 2 else None if k == 3 else g

    generic, fused = (
        train(optim.AdamW, device, torch.bfloat16, f, shapes=[(8, 64)], gradients=gradients, steps=5)
        for f in (False, True)
    )
    assert differences(generic, fused) == []
    assert launched == ["step_words", "step_elements", "step_words", "step_words"]


def test_parameters_that_come_and_go(device) -> None:
    """First gradients at different steps, a group grown by hand, memory that moves, a loaded state, changed states."""

    def run(fused: bool) -> Any:
        place = device if fused else "cpu"
        params = [nn.Parameter(torch.ones(8, 64, dtype=torch.bfloat16, device=place)) for _ in range(4)]
        optimizer = optim.AdamW(params[:3], lr=1e-2, fused=fused, dense_below=0)
        for k in range(11):
            for i, p in enumerate(params):
                p.grad = usual(k, i, (8, 64)).bfloat16().to(place) if k >= i else None
            if k == 4:
                optimizer.param_groups[0]["params"].append(params[3])
                params[1].data = params[1].data.clone()
            if k == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if k == 6:
                optimizer.state[params[2]] = dict(optimizer.state[params[2]], step=torch.full((), 9.0, device=place))
            if k == 7:
                optimizer.state[params[1]]["step"] = torch.full((), 5.0, device=place)
            if k == 8:
                del optimizer.state[params[3]]  # the last of all
            if k == 9:
                optimizer.state.clear()
            optimizer.step()
        return optimizer, params

    assert differences(run(False), run(True)) == []


@pytest.mark.parametrize(("master_weights", "bits"), [(None, 7), ("split24", 15)])
@pytest.mark.parametrize("make", [optim.Lion, optim.SGD], ids=lambda m: m.__name__)
def test_stochastic_rounding_is_right_in_the_mean(make: Any, master_weights: str | None, bits: int, device) -> None:
    """Equal weights land on either side of the exact result, as often as it is near; the draws of a seed are fixed."""
    count, lr, w = 512, 1e-3 if make is optim.Lion else 0.01, 1.5
    g = torch.arange(-15.5, 16).double()
    p = nn.Parameter(torch.full((count, 32), w, dtype=torch.bfloat16, device=device))
    options = {"momentum": 0.9} if make is optim.SGD else {}
    optimizer = make(
        [p], lr=lr, weight_decay=0.1, stochastic_rounding=True, master_weights=master_weights, fused=True, **options
    )
    p.grad = g.bfloat16().to(device).repeat(count, 1)
    optimizer.step()
    found, grid = optimizer.master_weight(p).cpu().double(), 2.0**-bits
    exact = w * (1 - lr * 0.1) - lr * g.sign() if make is optim.Lion else w - lr * (g + 0.1 * w)
    below = (exact / grid).floor() * grid
    assert bool(((found == below) | (found == below + grid)).all())
    near = (exact - below) / grid
    deviation = grid * (near * (1 - near) / count).sqrt()
    assert bool(((found.mean(0) - exact).abs() <= 5 * deviation + 2.0**-23).all())


WILD = [torch.nan, torch.inf, -torch.inf, 1e25, -1e30, 3e38]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (optim.AdamW, {}), (optim.AdamW, {"moments": "dense"}), (optim.AdamW, {"moments": NIBBLES}),
        (optim.AdamW, {"moments": {"exp_avg": "raw", "exp_avg_sq": "companded(curve=sqrt,group=32)"}}),
        (optim.Lion, {}), (optim.Lion, {"moments": "dense"}), (optim.SGD, {"momentum": 0.9}), (optim.SGD, {}),
        (optim.FOAM, {"matrix": True}), (optim.FOAM, {"matrix": True, "moments": "companded8", "level": 1}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_what_is_not_finite_stays_local_as_in_the_generic_path(make: Any, options: Any, dtype: Any, device) -> None:
    """Wild numbers strewn over the gradients: the same units keep the same bytes, and as many are counted."""

    def gradients(k: int, i: int, shape: tuple[int, ...]) -> Tensor:
        g = usual(0, i + k, shape)
        generator = torch.Generator().manual_seed(k)
        for wild in WILD:
            g.view(-1)[torch.randint(g.numel(), (2,), generator=generator)] = wild
        return g

    shapes = [(24, 256), (9, 70), (6, 128)]
    generic, fused = (
        train(make, device, dtype, f, shapes=shapes, gradients=gradients, **{"lr": 1e-2, **options})
        for f in (False, True)
    )
    assert differences(generic, fused) == []
    assert generic[0].skipped() == fused[0].skipped()
    assert len(fused[0].skipped()) == 3


@pytest.mark.parametrize("make", [optim.AdamW, optim.Lion, optim.SGD], ids=lambda m: m.__name__)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exponents=st.lists(st.integers(-44, 22), min_size=6, max_size=6), seed=st.integers(0, 99))
def test_any_scale_of_gradients(make: Any, exponents: list[int], seed: int, device) -> None:
    """From fp32's subnormal numbers to where squares leave its range, by row, rows of zeros between: bit for bit."""
    options = (
        {"momentum": 0.9}
        if make is optim.SGD
        else {"eps": 0.0 if seed % 3 == 0 else 1e-8}
        if make is optim.AdamW
        else {}
    )
    scales = torch.tensor([10.0**e for e in exponents], dtype=torch.float64)

    def gradients(k: int, i: int, shape: tuple[int, ...]) -> Tensor:
        g = torch.zeros(shape)
        g[: len(scales)] = torch.randn(len(scales), 64, generator=torch.Generator().manual_seed(seed + k))
        g[: len(scales)] *= scales[:, None]
        return g[torch.randperm(len(g), generator=torch.Generator().manual_seed(seed))]

    generic, fused = (
        train(make, device, torch.bfloat16, f, shapes=[(9, 64)], gradients=gradients, steps=2, **options)
        for f in (False, True)
    )
    assert differences(generic, fused) == []


def test_dense_states_of_another_dtype_are_refused(device) -> None:
    x = torch.zeros(4, 8, device=device)
    count = torch.zeros((), device=device)
    slot = Slot(x, count, count.clone(), None, {"exp_avg": {"data": x.bfloat16()}}, 0, (4, 8))
    with pytest.raises(UsageError, match="bfloat16"):
        kernels.get("triton").prepare("lion", [slot], {"exp_avg": StateStorage()})
    with pytest.raises(UsageError, match="supports"):
        kernels.get("triton").prepare("lion", [slot], {"exp_avg": None})


MOMENTS = ("raw", "cast", "companded", "split")
FIELDS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("companded", "curve"): ("linear", "softsign", "sqrt", "log"),
    ("companded", "bits"): (4,),
    ("companded", "group"): (32, 48),
    ("companded", "per_octave"): (8,),
    ("companded", "top"): (15, 100),
    ("companded", "rows"): ("last",),
    ("cast", "to"): ("fp16",),
    ("split", "high"): ("fp16",),
    ("split", "low_bits"): (16,),
}


def variants(name: str) -> list[Codec]:
    """A codec as it is by default, and, for every curve, with each of its other fields changed."""
    plain = [get(name)()]
    if name == "companded":
        plain = [Companded(curve, 8, 32) for curve in FIELDS[name, "curve"]]
    found = list(plain)
    for codec in plain:
        for f in dataclasses.fields(codec):
            for value in FIELDS.get((name, f.name), ()) if f.name != "curve" else ():
                with contextlib.suppress(InvalidCodec):
                    found.append(dataclasses.replace(codec, **{f.name: value}))
    return found


def test_every_field_of_a_codec_is_tried() -> None:
    """The table above names every field that a live moment's codec has: a new one has to be added to it."""
    for name in MOMENTS:
        assert {f.name for f in dataclasses.fields(get(name)())} == {k for n, k in FIELDS if n == name}


@pytest.mark.parametrize("codec", [c for n in MOMENTS for c in variants(n)], ids=str)
def test_supports_means_the_same_bits(codec: Codec, device) -> None:
    """Whatever a moment's codec says: it is not fused, or it is stepped as the generic path steps it."""
    unsigned = isinstance(codec, Companded) and not codec.signed
    group = codec.group if isinstance(codec, Companded) else 32
    moments = {"exp_avg": Companded("softsign", 8, group), "exp_avg_sq": Companded("sqrt", 8, group)}
    moments["exp_avg_sq" if unsigned else "exp_avg"] = codec

    def run(fused: bool) -> Any:
        shapes = [(8, 96), (3, 50), (4, 6, 10)]
        return train(optim.AdamW, device, torch.bfloat16, fused, shapes=shapes, moments=moments, gradients=usual)

    formats = {k: c.stored() for k, c in moments.items()}
    if kernels.get("triton").supports("adam", formats, torch.bfloat16, torch.int8):
        assert differences(run(False), run(True)) == []
    else:
        assert codec.name in ("cast", "split") or codec.rows == "last"
        with pytest.raises(OptimizerError, match="no fused adam step"):
            run(True)


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


@pytest.mark.parametrize("stored", ["fp32", "bf16+8", "fp16+16"])
@pytest.mark.parametrize("variant", FOLDED)
def test_foam(variant: str, stored: str, device) -> None:
    dtype, storage = STORED[stored]
    options = {k: v for k, v in FOLDED[variant].items() if dtype != torch.float16 or k != "stochastic_rounding"}
    generic, fused = (train(optim.FOAM, device, dtype, f, shapes=MATRICES, **storage, **options) for f in (False, True))
    assert differences(generic, fused) == []
    assert fused[0].skipped() == {"layer1.q_proj.weight": 1}


def on_a_grid(k: int, i: int, shape: tuple[int, ...]) -> Tensor:
    """Gradients whose squares add up without rounding, in any order."""
    return (usual(k, i, shape) * 10.0**i * 8).round() / 8


@pytest.mark.parametrize("stored", ["fp32", "bf16+8"])
@pytest.mark.parametrize("variant", SHARED)
def test_slimadam(variant: str, stored: str, device) -> None:
    dtype, storage = STORED[stored]
    options = {"shapes": [*MATRICES, (5, 6, 3, 3)], "gradients": on_a_grid, **storage, **SHARED[variant]}
    generic, fused = (train(optim.SlimAdam, device, dtype, f, steps=2, **options) for f in (False, True))
    assert differences(generic, fused) == []
    assert list(fused[0].skipped()) == ["layer1.q_proj.weight"]
    assert fused[0].skipped() == generic[0].skipped()


def test_sums_of_slimadam_are_a_few_roundings_apart(device) -> None:
    """They are added in another order than on the CPU."""
    (a, params), (b, others) = (
        train(optim.SlimAdam, device, torch.float32, f, shapes=MATRICES, rules={"*": [0]}, moments="dense")
        for f in (False, True)
    )
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(b.state[q][name].decode().cpu(), a.state[p][name].decode(), rtol=2e-6, atol=0)


def test_what_is_not_supported() -> None:
    supports = kernels.get("triton").supports
    eight = StateStorage(Curve("softsign", 8, True), 32)
    wide, folded, shared = StateStorage(eight.curve, 64), StateStorage(block=4), StateStorage(dims=(1,))
    assert supports("adam", {"exp_avg": eight, "exp_avg_sq": eight}, torch.bfloat16, torch.int8)
    assert supports("sgd", {}, torch.float32, None)
    assert supports("foam", {"exp_avg": folded, "exp_avg_sq": folded}, torch.float32, None)
    assert supports("slim", {"exp_avg": eight, "exp_avg_sq": shared}, torch.float32, None)
    for method, first, second, dtype, low in (
        ("adam", eight, wide, torch.bfloat16, torch.int8), ("adam", eight, eight, torch.float64, None),
        ("adam", eight, eight, torch.float32, torch.int8), ("adam", None, eight, torch.float32, None),
        ("adam", folded, folded, torch.float32, None), ("adam", eight, shared, torch.float32, None),
        ("foam", eight, eight, torch.float32, None), ("foam", folded, StateStorage(block=8), torch.float32, None),
        ("slim", eight, eight, torch.float32, None), ("slim", eight, StateStorage(dims=(0, 2)), torch.float32, None),
        ("slim", eight, StateStorage(eight.curve, 32, dims=(1,)), torch.float32, None),
        ("adam", StateStorage(eight.curve, 4096), eight, torch.float32, None),
        ("lorapre", eight, eight, torch.float32, None),
    ):  # fmt: skip
        assert not supports(method, {"exp_avg": first, "exp_avg_sq": second}, dtype, low), (method, first, second)
    assert not supports("adam", {"exp_avg": eight}, torch.bfloat16, torch.int8)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for streams and pinned memory; set `capturing` as a CUDA graph's context would."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory=False, **options: zeros(*args, **options))
    stand_in = Mock(capturing=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stand_in.capturing)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    return stand_in


def test_what_captured_graphs_copy_from_is_never_written_again(cuda: Any) -> None:
    """As many graphs as one likes, between steps or one after the other."""
    from statecodec.kernels.triton.launch import News

    news = News(2, torch.device("cpu"))
    news._cuda = True
    for at in range(12):
        if at < 6:
            news.tell(np.array([-1, at]))
        cuda.capturing = True
        news.tell(np.array([at, at]))
        cuda.capturing = False
        assert news.there.tolist() == [at, at]
    assert [buffer.tolist() for buffer in news._captured] == [[at, at] for at in range(12)]


def test_a_graph_and_steps_beside_it_each_see_their_own_gradients(device, cuda: Any) -> None:
    """A graph brings its addresses along at every replay, so after one nobody knows which are there."""
    if device.type == "cuda":
        pytest.skip("stands in for a CUDA device")
    params = [nn.Parameter(torch.ones(8, 64, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = optim.AdamW(params, fused=True, dense_below=0)
    mine, others = ([torch.full_like(p, at) for p in params] for at in (1, 2))

    def step(gradients: list[Tensor]) -> list[int]:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()
        news = next(iter(optimizer._launches.values()))._launches[0][1].news
        news._cuda = True
        return news.there[-len(params) :].tolist()

    def addresses(gradients: list[Tensor]) -> list[int]:
        return [g.data_ptr() for g in gradients]

    step(mine)
    cuda.capturing = True
    assert step(mine) == addresses(mine)
    cuda.capturing = False
    news = next(iter(optimizer._launches.values()))._launches[0][1].news
    (captured,) = news._captured
    assert step(others) == addresses(others)
    news.there.copy_(captured)  # a replay
    assert step(others) == addresses(others)


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
