"""Under FSDP2 as it is used: backward, clipping, mixed precision, gradient release; state dicts, by N ranks for M."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from statecodec import optim
from statecodec.distributed import StatecodecReader, StatecodecWriter
from statecodec.errors import OptimizerError
from statecodec.optim.sharding import whole
from tests.distributed.ranks import Ranks
from tests.optim.helpers import bits

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: optim.AdamW(p, lr=1e-2, dense_below=64),
    "adamw, dense": lambda p: optim.AdamW(p, lr=1e-2, moments="dense"),
    "adam": lambda p: optim.Adam(p, lr=1e-2, dense_below=64, weight_decay=0.1),
    "lion": lambda p: optim.Lion(p, lr=1e-3, dense_below=64),
    "sgd": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, dense_below=64),
    "sgdw": lambda p: optim.SGDW(p, lr=1e-2, momentum=0.9, dense_below=64, weight_decay=0.1),
    "foam": lambda p: optim.FOAM(p, lr=1e-2, dense_below=64, moments="companded8"),
    "slimadam": lambda p: optim.SlimAdam(p, lr=1e-2, dense_below=64, rules={"0.weight": [0], "2.weight": [1]}),
    "lorapre": lambda p: optim.LoRAPre(p, lr=1e-2, dense_below=64, rank=2),
    "muon": lambda p: optim.Muon(p, lr=1e-2, dense_below=64),
}


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 41), nn.Tanh(), nn.Linear(41, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def sharded(dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Sequential:
    """41, 3 and 1 rows: uneven, and fewer than some worlds have ranks."""
    model = net(dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, clip: float | None = None) -> list[float]:
    """The losses. All ranks see the same batches, so that their gradients do not depend on how many they are."""
    losses = []
    for step in steps:
        x = torch.randn(16, 70, generator=torch.Generator().manual_seed(step))
        loss = model(x.to(next(model.parameters()).dtype)).float().square().mean()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def everything(model: nn.Module, optimizer: optim.StateOptimizer) -> Any:
    """Weights and stored states, whole, by name."""
    found: dict[str, Any] = {}
    for name, p in model.named_parameters():
        states = {k: v for k, v in optimizer.state[p].items() if k != "skipped"}
        parts = {k: {n: whole(t) for n, t in v.parts.items()} if hasattr(v, "parts") else v for k, v in states.items()}
        found[name] = {"weight": whole(p.detach()).clone(), **parts}
    return bits(found)


def trains_as_one_process(names: list[str]) -> None:
    for name in names:
        for dtype, clip in ((torch.float32, 0.5), (torch.bfloat16, None)):
            own, cut = net(dtype), sharded(dtype)
            expected = train(own, OPTIMIZERS[name](own.named_parameters()), range(6), clip)
            found = train(cut, OPTIMIZERS[name](cut.named_parameters()), range(6), clip)
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            assert all(abs(a - b) <= tolerance * abs(b) for a, b in zip(found, expected, strict=True)), (name, found)


def test_losses_are_those_of_one_process(ranks: Ranks) -> None:
    ranks.run(2, trains_as_one_process, [*OPTIMIZERS])


def policies() -> None:
    for options in (
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    ):
        model = sharded(torch.float32, **options)
        optimizer = OPTIMIZERS["adamw"](model.named_parameters())
        losses = train(model, optimizer, range(6))
        assert losses[-1] < losses[0]
        assert all(isinstance(p, DTensor) for p in model.parameters())


def released() -> None:
    """Stepped in the backward pass: the same bits as stepped after it."""
    models = [sharded(), sharded()]
    optimizers = [OPTIMIZERS["slimadam"](model.named_parameters()) for model in models]
    with optim.enable_gradient_release(models[1], optimizers[1]):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, range(3))
    assert all(p.grad is None for p in models[1].parameters())
    assert everything(models[0], optimizers[0]) == everything(models[1], optimizers[1])


def masters() -> None:
    """fp32 weights out of a bf16 model and back in, sharded and whole."""
    model = sharded()
    optimizer = OPTIMIZERS["adamw"](model.named_parameters())
    train(model, optimizer, range(3))
    exact = optim.fp32_state_dict(model, optimizer)
    before = everything(model, optimizer)
    full = {k: whole(v).clone() for k, v in exact.items()}
    assert all(v.dtype == torch.float32 for v in full.values())
    for given in (exact, full):
        for p in model.parameters():
            optimizer.set_master_weight(p, torch.zeros(p.shape))
        assert everything(model, optimizer) != before
        optim.load_fp32_state_dict(model, optimizer, {k: v.clone() for k, v in given.items()})
        assert everything(model, optimizer) == before


@pytest.mark.parametrize("check", [policies, released, masters], ids=lambda f: f.__name__)
def test_as_fsdp2_is_used(ranks: Ranks, check: Any) -> None:
    ranks.run(3, check)


# --- state dicts


def state_dicts(names: list[str]) -> None:
    for name in names:
        model = sharded()
        optimizer = OPTIMIZERS[name](model.named_parameters())
        train(model, optimizer, range(3))
        expected = everything(model, optimizer)
        for options in (
            StateDictOptions(),
            StateDictOptions(cpu_offload=True),
            StateDictOptions(full_state_dict=True),
            StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
            StateDictOptions(flatten_optimizer_state_dict=True),
            StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=True),
        ):
            saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            again = sharded()
            set_model_state_dict(again, get_model_state_dict(model))
            fresh = OPTIMIZERS[name](again.named_parameters())
            set_optimizer_state_dict(again, fresh, saved, options=options)
            assert everything(again, fresh) == expected, (name, options)
            if options.full_state_dict and not options.broadcast_from_rank0:  # an optimizer that is not sharded
                own = net()
                with torch.no_grad():
                    for k, p in own.named_parameters():
                        p.copy_(whole(dict(model.named_parameters())[k].detach()))
                single = OPTIMIZERS[name](own.named_parameters())
                single.load_state_dict(saved)
                matrices = {k: v for k, v in everything(own, single).items() if k.endswith("weight")}
                assert matrices == {k: v for k, v in expected.items() if k.endswith("weight")}
                back = OPTIMIZERS[name](again.named_parameters())
                back.load_state_dict(single.state_dict())  # whole states, of which every rank takes its own
                assert everything(again, back) == expected


@pytest.mark.parametrize("n", [3])
def test_state_dicts_of_torch(ranks: Ranks, n: int) -> None:
    ranks.run(n, state_dicts, [*OPTIMIZERS])


def flattened() -> None:
    """Whole and flattened, before the first step and after three, into a sharded optimizer and one that is not."""
    options = StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=True)
    into = StateDictOptions(flatten_optimizer_state_dict=True)
    for steps in (0, 3):
        model = sharded()
        optimizer = OPTIMIZERS["adamw"](model.named_parameters())
        train(model, optimizer, range(steps))
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        options_of_groups = {k.rpartition(".")[2] for k in saved if k.startswith("param_groups.")}
        values = [v for k, v in saved.items() if k.startswith("state.")]
        assert options_of_groups >= {"lr", "betas", "moments"}
        assert all(isinstance(v, torch.Tensor) and not isinstance(v, DTensor) for v in values)
        again = sharded()
        set_model_state_dict(again, get_model_state_dict(model))
        fresh = OPTIMIZERS["adamw"](again.named_parameters())
        set_optimizer_state_dict(again, fresh, saved, options=into)
        assert everything(again, fresh) == everything(model, optimizer)


def from_torch() -> None:
    """A sharded state of torch.optim.AdamW is encoded on the way in."""
    model, ours = sharded(torch.float32), sharded(torch.float32)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, theirs, range(3))
    set_model_state_dict(ours, get_model_state_dict(model))
    dense = optim.AdamW(ours.named_parameters(), lr=1e-2, moments="dense")
    set_optimizer_state_dict(ours, dense, get_optimizer_state_dict(model, theirs))
    for a, b in zip(model.parameters(), ours.parameters(), strict=True):
        for k in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(whole(theirs.state[a][k]), whole(dense.state[b][k].parts["data"]))
    encoded = OPTIMIZERS["adamw"](ours.named_parameters())
    encoded.load_state_dict(dense.state_dict())
    p = next(iter(ours.parameters()))
    assert encoded.state[p]["exp_avg"].parts["codes"].placements == p.placements


@pytest.mark.parametrize("check", [flattened, from_torch], ids=lambda f: f.__name__)
def test_state_dicts_of_torch_in_other_forms(ranks: Ranks, check: Any) -> None:
    ranks.run(3, check)


def different_states() -> None:
    """torch broadcasts only what both sides call the same: the other ranks would go on from zeros without a word."""
    model, ours = sharded(torch.float32), sharded(torch.float32)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, theirs, range(3))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    saved = get_optimizer_state_dict(model, theirs, options=options)
    with pytest.raises(OptimizerError, match="the ranks were given different states"):
        set_optimizer_state_dict(ours, optim.AdamW(ours.named_parameters(), moments="dense"), saved, options=options)


def limits() -> None:
    """What torch itself refuses, as docs/distributed.md says."""
    model = sharded()
    optimizer = OPTIMIZERS["adamw"](model.named_parameters())
    state = get_optimizer_state_dict(model, optimizer)["state"]  # before the first step
    assert {int(s["step"]) for s in state.values()} == {1}
    flat = StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=True)
    whole_and_flat = get_optimizer_state_dict(model, optimizer, options=flat)
    with pytest.raises(KeyError):  # as for torch's own optimizers
        set_optimizer_state_dict(model, optimizer, whole_and_flat, options=flat)
    wide = optim.AdamW(model.parameters(), master_weights="split32")
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        get_optimizer_state_dict(model, wide, options=StateDictOptions(full_state_dict=True))


@pytest.mark.parametrize("check", [different_states, limits], ids=lambda f: f.__name__)
def test_what_torch_cannot_do_is_no_silent_loss(ranks: Ranks, check: Any) -> None:
    ranks.run(2, check)


def made(name: str) -> tuple[nn.Module, optim.StateOptimizer]:
    model = sharded()
    return model, OPTIMIZERS[name](model.named_parameters())


def state_of(model: nn.Module, optimizer: optim.StateOptimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def save(folder: str, names: list[str]) -> dict[str, Any]:
    """One checkpoint of all optimizers, in torch's files and in ours."""
    trained = {name: made(name) for name in names}
    for pair in trained.values():
        train(*pair, range(3))
    state = {name: state_of(*pair) for name, pair in trained.items()}
    n = dist.get_world_size()
    dcp.save(state, checkpoint_id=f"{folder}/{n}-dcp")
    dcp.save(state, storage_writer=StatecodecWriter(f"{folder}/{n}-own", preset="lossless", threads=1))
    return {name: everything(*pair) for name, pair in trained.items()}


def load(folder: str, saved_by: int, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("dcp", "own"):
        path = f"{folder}/{saved_by}-{kind}"
        empty = {name: made(name) for name in names}
        state = {name: state_of(*pair) for name, pair in empty.items()}
        reader = StatecodecReader(path) if kind == "own" else None
        dcp.load(state, checkpoint_id=None if reader else path, storage_reader=reader)
        for name, (model, optimizer) in empty.items():
            set_model_state_dict(model, state[name]["model"])
            set_optimizer_state_dict(model, optimizer, state[name]["optim"])
            assert optimizer.load_report.exact, optimizer.load_report
            found[name, kind] = everything(model, optimizer)
            if kind == "own":
                train(model, optimizer, range(3, 4))
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_saved_by_n_ranks_and_loaded_by_m(ranks: Ranks, tmp_path: Path, n: int) -> None:
    """torch.distributed.checkpoint keeps encoded states as they are, in its own files and in ours."""
    names = [*OPTIMIZERS]
    (expected, *_) = ranks.run(n, save, str(tmp_path), names)
    for m in (1, 2, 3, 4):
        for found in ranks.run(m, load, str(tmp_path), n, names):
            assert all(found[name, kind] == expected[name] for name, kind in found), m


def matrix() -> str:
    """The table of docs/distributed.md: every cell is a case of the test above."""
    tested = "N, M = 1 to 4: same bits"
    rows = [f"| `{name}` | {tested} | {tested} |" for name in OPTIMIZERS]
    head = "| saved by N ranks, loaded by M | torch's DCP files | `StatecodecWriter` |\n| --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n"


def test_the_documented_matrix_is_what_is_tested() -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    assert matrix() in page.read_text()
