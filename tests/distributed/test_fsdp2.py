"""Under FSDP2 as it is used: backward, clipping, mixed precision, gradient release; state dicts, by N ranks for M."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from statecodec import optim
from statecodec.errors import OptimizerError
from statecodec.optim.sharding import whole
from tests.distributed.fsdp2 import OPTIMIZERS, everything, net, sharded, train
from tests.distributed.ranks import Ranks


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


def policies(names: list[str]) -> None:
    """Computed in bf16, and shards kept on the CPU: on CPUs the same bits as without."""
    mixed = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    offloaded = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    for name in names:
        trained = []
        for options in ({}, offloaded, mixed):
            model = sharded(torch.float32, **options)
            optimizer = OPTIMIZERS[name](model.named_parameters())
            losses = train(model, optimizer, range(4))
            assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in model.parameters())
            trained.append((losses, everything(model, optimizer)))
        assert trained[0] == trained[1], name
        assert trained[2][0] == pytest.approx(trained[0][0], rel=0.05), name


def released(names: list[str]) -> None:
    """Stepped in the backward pass: the same bits as stepped after it."""
    for name in names:
        models = [sharded(), sharded()]
        optimizers = [OPTIMIZERS[name](model.named_parameters()) for model in models]
        with optim.enable_gradient_release(models[1], optimizers[1]):
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, range(2))
        assert all(p.grad is None for p in models[1].parameters())
        assert everything(models[0], optimizers[0]) == everything(models[1], optimizers[1]), name


@pytest.mark.parametrize("check", [policies, released], ids=lambda f: f.__name__)
def test_as_fsdp2_is_used(ranks: Ranks, check: Any) -> None:
    ranks.run(3, check, [*OPTIMIZERS])


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
        optimizer = OPTIMIZERS["AdamW"](model.named_parameters())
        train(model, optimizer, range(steps))
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        options_of_groups = {k.rpartition(".")[2] for k in saved if k.startswith("param_groups.")}
        values = [v for k, v in saved.items() if k.startswith("state.")]
        assert options_of_groups >= {"lr", "betas", "moments"}
        assert all(isinstance(v, torch.Tensor) and not isinstance(v, DTensor) for v in values)
        again = sharded()
        set_model_state_dict(again, get_model_state_dict(model))
        fresh = OPTIMIZERS["AdamW"](again.named_parameters())
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
    encoded = OPTIMIZERS["AdamW"](ours.named_parameters())
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
    optimizer = optim.AdamW(ours.named_parameters())
    train(ours, optimizer, range(1))
    before = everything(ours, optimizer)
    with pytest.raises(OptimizerError, match="`state` and `param_groups`" if dist.get_rank() else "another rank"):
        optimizer.load_state_dict({} if dist.get_rank() else optimizer.state_dict())
    assert everything(ours, optimizer) == before


def limits() -> None:
    """What torch itself refuses, as docs/distributed.md says."""
    model = sharded()
    optimizer = OPTIMIZERS["AdamW"](model.named_parameters())
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
