"""A small model under FSDP2, every optimizer for it, and all that they hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from statecodec import optim
from statecodec.optim.sharding import whole
from tests.optim.helpers import bits

SMALL: dict[str, Any] = {"lr": 1e-2, "dense_below": 64}
RULES = {"0.weight": [0], "2.weight": [1]}
# By the name of the class; moments encoded in 8 bits unless `moments="dense"` is given.
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p, **o: optim.AdamW(p, **{**SMALL, **o}),
    "Adam": lambda p, **o: optim.Adam(p, **{**SMALL, "weight_decay": 0.1, **o}),
    "Lion": lambda p, **o: optim.Lion(p, **{**SMALL, "lr": 1e-3, **o}),
    "SGD": lambda p, **o: optim.SGD(p, **{**SMALL, "momentum": 0.9, **o}),
    "SGDW": lambda p, **o: optim.SGDW(p, **{**SMALL, "momentum": 0.9, "weight_decay": 0.1, **o}),
    "FOAM": lambda p, **o: optim.FOAM(p, **{**SMALL, "moments": "companded8", **o}),
    "SlimAdam": lambda p, **o: optim.SlimAdam(p, **{**SMALL, "rules": RULES, "moments": "companded8", **o}),
    "LoRAPre": lambda p, **o: optim.LoRAPre(p, **{**SMALL, "rank": 2, **o}),
    "Muon": lambda p, **o: optim.Muon(p, **{**SMALL, **o}),
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


def state_of(model: nn.Module, optimizer: optim.StateOptimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
