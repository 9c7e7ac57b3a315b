"""Four processes: FSDP2 states saved by N ranks and loaded by M, for all N and M. Run by test_dcp.py.

python dcp_ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from statecodec.distributed import StatecodecReader, StatecodecWriter

WORLD = 4
SETTINGS: dict[str, dict[str, Any]] = {"lossless": {"preset": "lossless"}, "resume": {"threads": 1}}


def net() -> torch.nn.Module:
    """Uneven shards, a bias smaller than some worlds, and a parameter of one row."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(90, 301), torch.nn.GELU(), torch.nn.Linear(301, 3), torch.nn.Linear(3, 1)]
    return torch.nn.Sequential(*layers)


class Training:
    """A model and its optimizer on the ranks of a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.model = net()
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95))

    def step(self, steps: int) -> float:
        """The last loss; every rank sees the same batches."""
        torch.manual_seed(1)
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(16, 90)).square().mean()
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())

    def state(self, *, flat: bool = False) -> dict[str, Any]:
        """What is saved."""
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        optim = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return {"model": get_model_state_dict(self.model), "optim": optim, "note": {"step": 3, "who": "ranks"}}

    def take(self, state: dict[str, Any], *, flat: bool = False) -> None:
        """Load what was saved."""
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, optim_state_dict=state["optim"], options=options)

    def full(self) -> dict[str, torch.Tensor]:
        """All tensors, whole, on every rank."""
        options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
        optim = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        found = {**get_model_state_dict(self.model, options=options), **optim}
        return {name: value.clone() for name, value in found.items() if isinstance(value, torch.Tensor)}


def run(rank: int, folder: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    meshes = {n: DeviceMesh("cpu", list(range(n))) for n in range(1, WORLD + 1)}
    found: dict[str, Any] = {}
    for n, mesh in meshes.items():
        if rank < n:
            training = Training(mesh)
            training.step(3)
            whole = training.full()
            for name, settings in SETTINGS.items():
                path = f"{folder}/{name}-{n}"
                dcp.save(
                    training.state(), storage_writer=StatecodecWriter(path, **settings), process_group=mesh.get_group()
                )
            dcp.save(training.state(), checkpoint_id=f"{folder}/plain-{n}", process_group=mesh.get_group())
            flat = StatecodecWriter(f"{folder}/flat-{n}", threads=1)
            dcp.save(training.state(flat=True), storage_writer=flat, process_group=mesh.get_group())
            if rank == 0:
                torch.save(whole, f"{folder}/whole-{n}.pt")
        dist.barrier()
    if rank < 2:
        training = Training(meshes[2])
        training.step(3)
        writer = StatecodecWriter(f"{folder}/async", preset="lossless")
        dcp.async_save(training.state(), storage_writer=writer, process_group=meshes[2].get_group()).result()
        training.step(1)
        state = training.state()
        dcp.load(state, storage_reader=StatecodecReader(f"{folder}/async"), process_group=meshes[2].get_group())
        training.take(state)
        loaded = training.full()
        if rank == 0:
            torch.save(loaded, f"{folder}/async-on-2.pt")
    dist.barrier()
    for name in (*SETTINGS, "flat"):
        for n in meshes:
            for m, mesh in meshes.items():
                if rank < m:
                    training = Training(mesh)
                    training.step(1)
                    state = training.state(flat=name == "flat")
                    state["note"] = {"step": 0, "who": "nobody"}
                    reader = StatecodecReader(f"{folder}/{name}-{n}")
                    dcp.load(state, storage_reader=reader, process_group=mesh.get_group())
                    training.take(state, flat=name == "flat")
                    loaded = training.full()
                    losses = training.step(2)
                    if rank == 0:
                        torch.save(loaded, f"{folder}/{name}-{n}-on-{m}.pt")
                        found[f"{name} {n} {m}"] = [state["note"], losses]
                dist.barrier()
    if rank == 0:
        Path(f"{folder}/found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1],), nprocs=WORLD)
