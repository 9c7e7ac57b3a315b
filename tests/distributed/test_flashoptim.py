"""What a FlashOptim run under FSDP2 saves goes on with our optimizers, on another number of ranks too."""

from __future__ import annotations

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
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import statecodec
from statecodec import optim
from statecodec.optim.sharding import joined, whole
from tests.distributed.fsdp2 import train
from tests.distributed.ranks import Ranks
from tests.optim.published import flash

pytest.importorskip("flashoptim", reason="the published package is not installed")

# dtype, bits of a master weight, further options; our optimizer takes what both need.
RUNS: dict[str, tuple[torch.dtype, int | None, dict[str, Any]]] = {
    "AdamW": (torch.bfloat16, 24, {}),
    "Adam": (torch.float32, None, {}),
    "Lion": (torch.bfloat16, 32, {}),
    "SGDW": (torch.bfloat16, 24, {"momentum": 0.9}),
}


def net(dtype: torch.dtype) -> nn.Sequential:
    """FlashOptim saves even shards only: 42 and 6 rows. 2 and 3 ranks cut them inside of 32 elements.

    The number of scales of a bias tells how many ranks there were; of weights alone, two ranks have as many as one.
    """
    torch.manual_seed(0)
    bias = dtype == torch.bfloat16
    return nn.Sequential(nn.Linear(70, 42, bias), nn.Tanh(), nn.Linear(42, 6, bias)).to(dtype)


def sharded(dtype: torch.dtype) -> nn.Module:
    model = net(dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ours(name: str, params: Any) -> optim.StateOptimizer:
    _, bits, options = RUNS[name]
    return getattr(optim, name)(params, lr=1e-3, moments="dense", master_weights=bits and f"split{bits}", **options)


def moments(optimizer: optim.StateOptimizer, params: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Whole, of every parameter."""
    return {
        name: {
            k: whole(v.parts["data"])
            for k, v in optimizer.state[p].items()
            if k in ("exp_avg", "exp_avg_sq", "momentum_buffer")
        }
        for name, p in params
    }


def save(folder: Path, names: list[str]) -> None:
    """Two steps of each, saved whole and in shards; the shards go into our optimizer here and now."""
    saved = {}
    for name in names:
        dtype, bits, options = RUNS[name]
        model = sharded(dtype)
        theirs = flash(f"Flash{name}", model.parameters(), lr=1e-3, master_weight_bits=bits, **options)
        train(model, theirs, range(2))
        shards = get_optimizer_state_dict(model, theirs)
        exact = {
            k: {
                s: whole(joined(v.materialize().float(), p))
                for s, v in theirs.state[p].items()
                if hasattr(v, "materialize")
            }
            for k, p in model.named_parameters()
        }
        optimizer = ours(name, model.named_parameters())
        set_optimizer_state_dict(model, optimizer, shards)
        check(moments(optimizer, model.named_parameters()), exact)
        full = StateDictOptions(full_state_dict=True)
        masters = {k: v.clone() for k, v in optim.fp32_state_dict(model, optimizer).items()}
        state = get_optimizer_state_dict(model, theirs, options=full)
        saved[name] = get_model_state_dict(model, options=full), state, exact, {k: whole(v) for k, v in masters.items()}
        if name == "AdamW":
            dcp.save({"model": get_model_state_dict(model), "optim": shards}, checkpoint_id=folder / "dcp")
    if dist.get_rank() == 0:
        torch.save(saved, folder / "whole.pt")


def check(found: dict[str, dict[str, torch.Tensor]], exact: dict[str, dict[str, torch.Tensor]]) -> None:
    assert found.keys() == exact.keys()
    for name, states in exact.items():
        assert found[name].keys() == states.keys()
        for state, value in states.items():
            torch.testing.assert_close(found[name][state], value, rtol=1e-6, atol=0)


def placed_as(p: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    return distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full


def load(folder: Path) -> None:
    """Whole states, of which every rank takes its own; without ranks, all."""
    for name, (weights, state, exact, masters) in torch.load(folder / "whole.pt").items():
        model = (sharded if dist.is_initialized() else net)(RUNS[name][0])
        with torch.no_grad():
            for k, p in model.named_parameters():
                p.copy_(placed_as(p, weights[k]))
        optimizer = ours(name, model.named_parameters())
        if dist.is_initialized():
            set_optimizer_state_dict(model, optimizer, state)
        else:
            optimizer.load_state_dict(state)
        check(moments(optimizer, model.named_parameters()), exact)
        found = optim.fp32_state_dict(model, optimizer)
        assert all(torch.equal(whole(found[k]), v) for k, v in masters.items())
        assert {s["step"].item() for s in optimizer.state.values()} == {2 if "Adam" in name else 1}
        train(model, optimizer, range(2, 3))


@pytest.mark.parametrize(("n", "m", "names"), [(2, 3, [*RUNS]), (3, 2, ["AdamW"])])
def test_states_quantised_in_shards_load_on_any_number_of_ranks(
    ranks: Ranks, tmp_path: Path, n: int, m: int, names: list[str]
) -> None:
    ranks.run(n, save, tmp_path, names)
    load(tmp_path)
    ranks.run(m, load, tmp_path)
    statecodec.convert(tmp_path / "dcp", tmp_path / "dense.pt", "torch")
    dense = torch.load(tmp_path / "dense.pt")["optim"]["state"]
    exact = torch.load(tmp_path / "whole.pt")["AdamW"][2]
    check({name: {k: dense[i][k] for k in states} for i, (name, states) in enumerate(exact.items())}, exact)
