"""What a torch user expects of an optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statecodec import optim
from statecodec.errors import OptimizerError, StatecodecError
from tests.optim.helpers import EVERY, gradients, parameters, run


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 20, generator=generator)
    return x, torch.tanh(x @ torch.randn(20, 3, generator=generator))


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).to(dtype)


LRS = {
    "sgd-plain": 0.3,
    "sgd": 0.1,
    "sgdw": 0.1,
    "lorapre": 0.03,
    "lorapre-paper": 0.03,
    "foam": 0.02,
    "foam-companded": 0.02,
}


@pytest.mark.filterwarnings("ignore:SlimAdam rules that match no parameter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_it_trains(name: str, dtype: torch.dtype) -> None:
    model, (x, y) = mlp(dtype), data()
    optimizer = EVERY[name](model.named_parameters())
    for group in optimizer.param_groups:
        group["lr"] = LRS.get(name, group["lr"])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[::10]


def test_closure_loss_and_zero_grad() -> None:
    model, (x, y) = mlp(), data()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(x) - y).square().mean()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.step() is None


@pytest.mark.filterwarnings("ignore:SlimAdam rules that match no parameter")
def test_frozen_unused_and_empty_parameters() -> None:
    used, frozen, unused, empty = (nn.Parameter(torch.ones(s)) for s in ((5, 3), (4,), (2, 2), (0, 7)))
    frozen.requires_grad_(False)
    for name, make in EVERY.items():
        optimizer = make([("w", used), ("f", frozen), ("u", unused), ("e", empty)])
        used.grad, empty.grad = torch.ones(5, 3), torch.ones(0, 7)
        optimizer.step()
        assert frozen not in optimizer.state
        assert unused not in optimizer.state, name
        assert torch.equal(unused.detach(), torch.ones(2, 2))
        make([("w", used), ("f", frozen), ("u", unused), ("e", empty)]).load_state_dict(optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:SlimAdam rules that match no parameter")
def test_scalars_and_vectors() -> None:
    for name, make in EVERY.items():
        params = [nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, 9))]
        optimizer = make(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(bool((p < 1).all()) for p in params), name


def test_add_param_group_keeps_states() -> None:
    params = parameters()
    names = list(params)
    optimizer = optim.AdamW([params[names[0]]], lr=1e-2, dense_below=0)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [params[n] for n in names[1:]], "moments": "dense", "lr": 1e-3})
        run(optimizer, params, range(step, step + 1))
    assert int(optimizer.state[params[names[0]]]["step"]) == 4
    assert int(optimizer.state[params[names[1]]]["step"]) == 2
    assert optimizer.state[params[names[1]]]["exp_avg"].codec.name == "raw"
    with pytest.raises(OptimizerError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "moments": "nonsense"})
    assert len(optimizer.param_groups) == 2
    again = optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups], dense_below=0)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[1]["lr"] == 1e-3


def test_gradient_clipping_and_schedulers() -> None:
    model, (x, y) = mlp(), data()
    optimizer = optim.Lion(model.parameters(), lr=1e-3)
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns when it does not see step() being called
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            for s in schedulers:
                s.step()
    assert 0 < optimizer.param_groups[0]["lr"] < 1e-3


def test_fully_decoupled_weight_decay() -> None:
    p = nn.Parameter(torch.full((4,), 2.0))
    optimizer = optim.AdamW([p], lr=1e-2, weight_decay=0.1, decouple_lr=True)
    p.grad = torch.zeros(4)
    optimizer.step()
    assert torch.allclose(p.detach(), torch.full((4,), 2.0 * 0.9))
    optimizer.param_groups[0]["lr"] = 5e-3
    optimizer.step()
    assert torch.allclose(p.detach(), torch.full((4,), 2.0 * 0.9 * 0.95))


def test_grad_scaler_skips_and_unscales() -> None:
    model, (x, y) = mlp(), data()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale((model(x) - y).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    reference = mlp()
    exact = optim.AdamW(reference.parameters(), lr=1e-2)
    (reference(x) - y).square().mean().backward()
    exact.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale((model(x) * torch.inf).mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_step_hooks_run() -> None:
    seen: list[str] = []
    params = parameters()
    optimizer = EVERY["adamw"](params.items())
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    run(optimizer, params, range(1))
    assert seen == ["pre", "post"]


def test_compiled_models_are_known_by_their_own_names() -> None:
    model = nn.ModuleDict({"lm_head": nn.Linear(8, 8), "layer": nn.Linear(8, 8)})
    wrapped = torch.compile(model, backend="eager")
    optimizer = optim.Muon(wrapped.named_parameters(), dense_below=0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kinds = {name: set(optimizer.state[p]) & {"exp_avg", "momentum_buffer"} for name, p in model.named_parameters()}
    assert kinds["layer.weight"] == {"momentum_buffer"}
    assert optimizer.recipe(model["layer"].weight, optimizer.param_groups[0]).name == "layer.weight"
    assert kinds["lm_head.weight"] == kinds["layer.bias"] == {"exp_avg"}


@pytest.mark.filterwarnings("ignore:SlimAdam rules that match no parameter")
@pytest.mark.parametrize("name", EVERY)
def test_a_compiled_step_is_the_step(name: str) -> None:
    """Its kernels are compiled already: torch breaks the graph there."""
    results, (x, y) = [], data()
    for compiled in ("not", "the step", "what calls it"):
        model = mlp()
        optimizer = EVERY[name](model.named_parameters())

        def train(model: nn.Module = model, step: Any = optimizer.step) -> None:
            (model(x) - y).square().mean().backward()
            step()

        if compiled == "the step":
            step = torch.compile(optimizer.step, backend="eager")
            call: Any = lambda train=train, step=step: train(step=step)  # noqa: E731
        else:
            call = torch.compile(train, backend="eager") if compiled == "what calls it" else train
        for _ in range(2):
            optimizer.zero_grad()
            call()
        results.append([p.detach().clone() for p in model.parameters()])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_a_compiled_model_trains_like_an_eager_one() -> None:
    results = []
    for compiled in (False, True):
        model, (x, y) = mlp(), data()
        call: Any = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = optim.AdamW(call.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (call(x) - y).square().mean().backward()
            optimizer.step()
        results.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
    assert torch.allclose(*results, atol=1e-6)


def test_state_is_reported_in_bytes() -> None:
    p = nn.Parameter(torch.zeros(1000, 64, dtype=torch.bfloat16))
    optimizer = optim.AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state_nbytes() == 64_000 * (1 + 2 * (1 + 2 / 32)) + 8


REFUSED: dict[str, Any] = {
    "complex": lambda: optim.AdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]),
    "negative lr": lambda: optim.AdamW([nn.Parameter(torch.zeros(2))], lr=-1.0),
    "nan lr": lambda: optim.AdamW([nn.Parameter(torch.zeros(2))], lr=float("nan")),
    "beta of one": lambda: optim.AdamW([nn.Parameter(torch.zeros(2))], betas=(0.9, 1.0)),
    "unknown option": lambda: optim.AdamW([nn.Parameter(torch.zeros(2))], momentums="dense"),  # type: ignore[call-arg]
    "signed second moment": lambda: optim.AdamW([nn.Parameter(torch.zeros(2))], moments="companded(curve=linear)"),
    "unsigned first moment": lambda: optim.AdamW([nn.Parameter(torch.zeros(2))], moments="companded(curve=log)"),
    "folded moments": lambda: optim.AdamW([nn.Parameter(torch.zeros(2))], moments="folded"),
    "a moment left out": lambda: optim.AdamW([nn.Parameter(torch.zeros(2))], moments={"exp_avg": "raw"}),
    "no such codec": lambda: optim.Lion([nn.Parameter(torch.zeros(2))], moments="zip"),
    "no such backend": lambda: optim.Lion([nn.Parameter(torch.zeros(2))], backend="fortran"),
    "nesterov without momentum": lambda: optim.SGD([nn.Parameter(torch.zeros(2))], nesterov=True),
    "a level of 40": lambda: optim.FOAM([nn.Parameter(torch.zeros(2))], level=40),
    "a variant": lambda: optim.FOAM([nn.Parameter(torch.zeros(2))], variant="best"),
    "rank zero": lambda: optim.LoRAPre([nn.Parameter(torch.zeros(2))], rank=0),
    "an adjustment": lambda: optim.Muon([nn.Parameter(torch.zeros(2))], adjust="most"),
    "rules of a number": lambda: optim.SlimAdam([nn.Parameter(torch.zeros(2))], rules=3),
    "a rules file that is not there": lambda: optim.SlimAdam([nn.Parameter(torch.zeros(2))], rules="/no/such.json"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_options_are_checked(what: str) -> None:
    with pytest.raises(StatecodecError):
        REFUSED[what]()


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = optim.AdamW(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(OptimizerError, match="sparse"):
        optimizer.step()


def test_fp64_parameters_keep_fp64_states_or_are_refused() -> None:
    p = nn.Parameter(torch.zeros(90, 90, dtype=torch.float64))
    p.grad = torch.full_like(p, 1e-3)
    optimizer = optim.AdamW([p])
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].parts["data"].dtype == torch.float64
    for cls in (optim.FOAM, optim.LoRAPre):
        with pytest.raises(OptimizerError, match="fp64"):
            cls([p]).step()
    with pytest.raises(OptimizerError, match="fp64"):
        optim.SlimAdam([("w", p)], rules={"w": [0]}).step()


def test_gradients_are_left_as_they_are() -> None:
    for name, make in EVERY.items():
        params = parameters()
        optimizer = make(params.items())
        for g in optimizer.param_groups:
            g["maximize"] = True
        for k, g in gradients(0).items():
            params[k].grad = g
        before = {k: p.grad.clone() for k, p in params.items() if p.grad is not None}
        optimizer.step()
        assert all(torch.equal(params[k].grad, before[k]) for k in params), name
