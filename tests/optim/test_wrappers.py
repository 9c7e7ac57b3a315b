"""Inside torch's wrappers: ZeroRedundancyOptimizer, and parameters that FSDP1 has flattened."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.testing._internal.distributed.fake_pg import FakeStore

from statecodec import optim
from statecodec.errors import OptimizerError
from tests.optim.helpers import bits, parameters, run

with warnings.catch_warnings():  # of torch.jit, which it is compiled with
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_of_two() -> Iterator[None]:
    """The first of two ranks whose collectives move nothing: enough to shard."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", optim.OPTIMIZERS.values(), ids=optim.OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:SlimAdam rules that match no parameter")
@pytest.mark.usefixtures("alone")
def test_zero_redundancy_optimizer_resumes(cls: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    zero = ZeroRedundancyOptimizer(list(params.values()), optimizer_class=cls, lr=1e-2, dense_below=0)
    run(zero, params, range(3))
    zero.consolidate_state_dict()
    saved = copy.deepcopy(zero.state_dict())
    others = {k: nn.Parameter(p.detach().clone()) for k, p in params.items()}
    again = ZeroRedundancyOptimizer(list(others.values()), optimizer_class=cls, lr=1e-2, dense_below=0)
    again.load_state_dict(saved)
    run(zero, params, range(3, 5))
    run(again, others, range(3, 5))
    assert bits(others) == bits(params)
    zero.consolidate_state_dict()
    again.consolidate_state_dict()
    assert bits(again.state_dict()["state"]) == bits(zero.state_dict()["state"])


def sharded(use_orig_params: bool, strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    return FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, sharding_strategy=strategy, device_id=torch.device("cpu")
    )


ELEMENTWISE = [optim.AdamW, optim.Adam, optim.SGD, optim.SGDW, optim.Lion]
WHOLE = [cls for cls in optim.OPTIMIZERS.values() if cls not in ELEMENTWISE]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*FSDP:UserWarning")
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.usefixtures("one_of_two")
def test_flattened_shards_are_refused_where_shapes_matter(use_orig_params: bool) -> None:
    model = sharded(use_orig_params)
    assert all(p.ndim == 1 for p in model.parameters())
    for cls in WHOLE:
        with pytest.raises(OptimizerError, match="flattened by FSDP1"):
            cls(model.named_parameters(), lr=1e-2)
        with pytest.raises(OptimizerError, match="flattened by FSDP1"):
            cls([{"params": [p]} for p in model.parameters()], lr=1e-2)
    for cls in ELEMENTWISE:
        optimizer = cls(model.named_parameters(), lr=1e-2)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert all(bool((p != b).all()) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*FSDP:UserWarning", "ignore:The .*NO_SHARD")
@pytest.mark.usefixtures("one_of_two")
def test_parameters_that_fsdp_leaves_whole_are_taken() -> None:
    """NO_SHARD marks parameters as flattened too, but leaves them their shapes."""
    model = sharded(True, ShardingStrategy.NO_SHARD)
    vectors, matrices = ([p for p in model.parameters() if p.ndim == n] for n in (1, 2))
    optim.Muon([{"params": vectors}, {"params": matrices}], lr=1e-2)
