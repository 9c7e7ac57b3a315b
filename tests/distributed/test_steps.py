"""Optimizers on DTensor parameters: every rank's step is the unsharded step, on 1 to 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from statecodec import optim
from statecodec.errors import OptimizerError
from statecodec.optim.sharding import whole
from tests.distributed.ranks import Ranks
from tests.optim.helpers import EVERY, bits, gradients, parameters, relative

# What goes element by element, or block by block of a row: bit for bit what one process computes.
EXACT = [k for k in EVERY if k not in ("adamw-split32", "muon") and not k.startswith(("slimadam", "lorapre"))]
SHARED = ["slimadam", "slimadam-companded"]
WHOLE = ["muon", "lorapre", "lorapre-muon"]


def placed(x: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


def step_both(name: str, mesh: DeviceMesh, placements: dict[str, Any], dtype: torch.dtype, steps: int = 3) -> Any:
    """The same steps on sharded and on whole parameters: names, optimizers and parameters of both."""
    own = parameters(dtype)
    sharded = {k: nn.Parameter(placed(p.detach(), mesh, placements[k])) for k, p in own.items()}
    plain, split = EVERY[name](own.items()), EVERY[name](sharded.items())
    for step in range(steps):
        for k, g in gradients(step).items():
            own[k].grad = g.to(dtype)
            sharded[k].grad = placed(g.to(dtype), mesh, placements[k])
        plain.step()
        split.step()
    return plain, own, split, sharded


def states(optimizer: optim.StateOptimizer, p: Tensor) -> Any:
    """Every stored part of a parameter's states, whole."""
    return {
        k: {n: whole(t) for n, t in v.parts.items()} for k, v in optimizer.state[p].items() if hasattr(v, "parts")
    }


def same_as_whole(names: list[str], dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in names:
        plain, own, split, sharded = step_both(name, mesh, dict.fromkeys(parameters(), [Shard(0)]), dtype)
        for k, p in own.items():
            assert torch.equal(whole(sharded[k].detach()), p.detach()), (name, k)
            mine = [t for v in split.state[sharded[k]].values() if hasattr(v, "parts") for t in v.parts.values()]
            assert all(isinstance(t, DTensor) for t in mine)
            assert all(t.to_local().shape[0] == sharded[k].to_local().shape[0] for t in mine if t.ndim), (name, k)
            if p.ndim > 1:  # a sharded vector is stored exactly
                assert bits(states(split, sharded[k])) == bits(states(plain, p)), (name, k)
        dense, expected = split.state_dict(dense=True)["state"], plain.state_dict(dense=True)["state"]
        matrices = [i for i, p in enumerate(own.values()) if p.ndim > 1]
        assert bits([{k: whole(v) for k, v in dense[i].items()} for i in matrices]) == bits(
            [expected[i] for i in matrices]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_sharded_step_is_the_whole_step_bit_for_bit(ranks: Ranks, n: int, dtype: torch.dtype) -> None:
    """6 rows on 4 ranks are uneven and leave the last rank nothing; 5 vectors' elements fall where they may."""
    ranks.run(n, same_as_whole, [k for k in EXACT if k not in VECTORS_DIFFER], dtype)


# Vectors are encoded in one process (dense_below=0) and exact when they are sharded.
VECTORS_DIFFER: list[str] = []
