"""FSDP2 of tensor parallel layers, as torch makes them: rows cut twice, and rows and columns cut, on 2 x 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from statecodec.distributed import StatecodecReader, StatecodecWriter
from statecodec.errors import OptimizerError
from statecodec.optim.sharding import whole
from tests.distributed.fsdp2 import OPTIMIZERS, everything, state_of
from tests.distributed.ranks import Ranks
from tests.optim.helpers import relative

WHOLE = ("LoRAPre", "Muon")  # need all of a matrix
BATCH = torch.randn(16, 70, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    """Columns of the second layer are cut at 128, between groups, also of folds of four."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 256), nn.Tanh(), nn.Linear(256, 9)).bfloat16()


def parallel() -> nn.Module:
    model = net()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in model:
        fully_shard(layer, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def replicated() -> nn.Module:
    """HSDP: two groups of ranks, each of which shards the model by itself."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = net()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def rows() -> nn.Module:
    model = net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def stepped(make: Any, name: str) -> tuple[nn.Module, Any, nn.Module, Any]:
    """Three steps, and the same in one process with the same gradients."""
    cut, own = make(), net()
    pair = [OPTIMIZERS[name](model.named_parameters()) for model in (cut, own)]
    for _ in range(3):
        cut(BATCH.bfloat16()).float().square().mean().backward()
        nn.utils.clip_grad_norm_(cut.parameters(), 0.5)
        for p, q in zip(cut.parameters(), own.parameters(), strict=True):
            q.grad = whole(p.grad).clone()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    return cut, pair[0], own, pair[1]


def steps(names: list[str]) -> None:
    for name in names:
        for make in (parallel, replicated):
            if make is parallel and name in WHOLE:
                with pytest.raises(OptimizerError, match=r"0\.weight: .* needs all of a hidden matrix"):
                    stepped(make, name)
                continue
            cut, found, own, expected = stepped(make, name)
            if name == "SlimAdam":  # sums in another order
                start = net().state_dict()
                for k in ("0.weight", "2.weight"):
                    ends = (whole(m.get_parameter(k).detach()).float() - start[k].float() for m in (cut, own))
                    assert relative(*ends) < 1e-2, k
            else:
                pair = everything(cut, found), everything(own, expected)
                assert pair[0]["0.weight"] == pair[1]["0.weight"], (name, make)
                assert pair[0]["2.weight"] == pair[1]["2.weight"], (name, make)
            if make is parallel:
                assert cut[0].weight.placements[1] == Shard(0)
                assert cut[2].weight.placements == (Shard(0), Shard(1))


def test_steps_are_those_of_one_process(ranks: Ranks) -> None:
    ranks.run(4, steps, [*OPTIMIZERS])


def save(folder: Path, names: list[str]) -> Any:
    trained = {name: stepped(parallel, name)[:2] for name in names}
    state = {name: state_of(*pair) for name, pair in trained.items()}
    dcp.save(state, checkpoint_id=folder / "dcp")
    dcp.save(state, storage_writer=StatecodecWriter(folder / "own", preset="lossless", threads=1))
    return {name: everything(*pair) for name, pair in trained.items()}


def load(folder: Path, names: list[str]) -> Any:
    found: dict[Any, Any] = {}
    for kind in ("dcp", "own"):
        empty = {}
        for name in names:
            model = rows()
            empty[name] = model, OPTIMIZERS[name](model.named_parameters())
        state = {name: state_of(*pair) for name, pair in empty.items()}
        reader = StatecodecReader(folder / kind) if kind == "own" else None
        dcp.load(state, checkpoint_id=None if reader else folder / kind, storage_reader=reader)
        for name, (model, optimizer) in empty.items():
            set_model_state_dict(model, state[name]["model"])
            set_optimizer_state_dict(model, optimizer, state[name]["optim"])
            assert optimizer.load_report.exact, optimizer.load_report
            found[name, kind] = everything(model, optimizer)
    return found


def test_tensor_parallel_states_load_where_rows_are_sharded(ranks: Ranks, tmp_path: Path) -> None:
    names = [name for name in OPTIMIZERS if name not in WHOLE]
    (expected, *_) = ranks.run(4, save, tmp_path, names)
    for found in ranks.run(3, load, tmp_path, names):
        assert all(value == expected[name] for (name, _), value in found.items())
