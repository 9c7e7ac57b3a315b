"""Models that are compiled, cast or replicated, on two ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from statecodec import optim
from statecodec.optim.sharding import whole
from tests.distributed.fsdp2 import OPTIMIZERS, everything, net, sharded, train
from tests.distributed.ranks import Ranks
from tests.optim.helpers import bits


def compiled() -> None:
    """Without inductor, which needs a C++ compiler: graphs are captured, and run as they are."""
    models = [sharded(), sharded()]
    for layer in models[1]:
        layer.compile(backend="aot_eager")
    pairs = [
        (m, OPTIMIZERS["AdamW"](m.named_parameters()))
        for m in (models[0], torch.compile(models[1], backend="aot_eager"))
    ]
    losses = [train(*pair, range(3)) for pair in pairs]
    assert losses[0] == losses[1]
    model, optimizer = pairs[1]
    assert everything(models[1], optimizer) == everything(*pairs[0])
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    plain = sharded()
    set_model_state_dict(plain, get_model_state_dict(model))
    fresh = OPTIMIZERS["AdamW"](plain.named_parameters())
    set_optimizer_state_dict(plain, fresh, saved)
    assert fresh.load_report.exact
    assert everything(plain, fresh) == everything(*pairs[0])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(70, 41), nn.LayerNorm(41), nn.Linear(41, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)))


def cast(dtype: torch.dtype = torch.bfloat16) -> None:
    """A norm and a head stay in fp32, each layer sharded by itself: FSDP2 wants one dtype in what it gathers."""
    models, exact = [], {k: v.clone() for k, v in Normed().state_dict().items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for cut in (False, True):
        model = Normed()
        optim.cast_model(model, dtype, full_precision_layers=["head"], full_precision_recast_layers=["norm"])
        if cut:
            for layer in model.children():
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = optim.AdamW(model.named_parameters(), lr=1e-2, dense_below=64, master_weights="split32")
        optim.load_fp32_state_dict(model, optimizer, exact)
        models.append((model, optimizer))
    (own, plain), (model, optimizer) = models
    masters = optim.fp32_state_dict(model, optimizer)
    assert all(isinstance(v, DTensor) and torch.equal(whole(v), exact[k]) for k, v in masters.items())
    dtypes = {k: p.dtype for k, p in model.named_parameters()}
    assert dtypes == {k: p.dtype for k, p in own.named_parameters()}
    assert [k for k, d in dtypes.items() if d == torch.float32] == [
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    ]
    expected, found = train(own, plain, range(6)), train(model, optimizer, range(6))
    assert found == pytest.approx(expected, rel=1e-2)
    assert found[-1] < found[0]
    trained = optim.fp32_state_dict(model, optimizer)
    assert any(not torch.equal(whole(v), whole(v).to(dtype).float()) for v in trained.values())
    before = everything(model, optimizer)
    full = {k: whole(v).clone() for k, v in trained.items()}
    for p in model.parameters():
        optimizer.set_master_weight(p, torch.zeros(p.shape))
    optim.load_fp32_state_dict(model, optimizer, full)
    assert everything(model, optimizer) == before


def partitioned() -> None:
    """ZeroRedundancyOptimizer: each rank holds the states of some parameters; the steps are those of a whole one."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options: dict[str, Any] = {"lr": 1e-2, "dense_below": 64}
    for kind in (optim.AdamW, optim.Adam, optim.Lion, optim.SGD, optim.SGDW, optim.FOAM, optim.LoRAPre, optim.Muon):
        models = [nn.parallel.DistributedDataParallel(net()) for _ in range(3)]
        single = kind(models[0].parameters(), **options)
        divided, resumed = (ZeroRedundancyOptimizer(m.parameters(), kind, **options) for m in models[1:])
        train(models[0], single, range(3))
        train(models[1], divided, range(3))
        assert bits(models[0].state_dict()) == bits(models[1].state_dict())
        assert 0 < len(divided.optim.state) < len(single.state)
        divided.consolidate_state_dict(0)
        box = [divided.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box)
        (saved,) = box
        again = kind(models[2].parameters(), **options)
        models[2].load_state_dict(models[1].state_dict())
        again.load_state_dict(copy.deepcopy(saved))
        assert again.load_report.exact
        assert bits(again.state_dict()["state"]) == bits(single.state_dict()["state"])
        resumed.load_state_dict(saved)
        train(models[0], single, range(3, 5))
        train(models[2], resumed, range(3, 5))
        assert bits(models[0].state_dict()) == bits(models[2].state_dict())


def cast_to_fp16() -> None:
    cast(torch.float16)


@pytest.mark.parametrize("check", [compiled, cast, cast_to_fp16, partitioned], ids=lambda f: f.__name__)
def test_on_two_ranks(ranks: Ranks, check: Any) -> None:
    ranks.run(2, check)
