"""What FlashOptim's own tests of FSDP2 and of state dicts hold it to, held for all optimizers here.

* Every step under FSDP2 is that of one process that sees all batches, with weight decay, accumulated gradients and
  gradient release, resharded after the forward pass or not; all ranks hold the same, and all of it is finite:
  `test_each_rank_with_batches_of_its_own`. From the same gradients, bit for bit: test_steps.py.
* fp32 weights go out, and come back after the weights were lost: `test_fp32_weights_come_back`.
* States go through DCP with every tensor unchanged, for every width of master weights, and are stepped afterwards:
  `test_states_come_back_from_dcp`; on other numbers of ranks, test_matrix.py.
* torch.optim's states load, and ours load into torch.optim: `from_torch` in test_fsdp2.py,
  `test_any_optimizer_resumes_from_any_other` and `test_dense_form_loads_into_torch_and_comes_back` in tests/optim.
* States go through memory and through a file with every code and low bit unchanged, and are stepped afterwards: bit for
  bit, and in a new process, in tests/optim/test_resume.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

from statecodec import optim
from statecodec.optim.sharding import whole
from tests.distributed.fsdp2 import OPTIMIZERS, everything, net, sharded, state_of, train
from tests.distributed.ranks import Ranks
from tests.optim.helpers import relative


def batch_loss(model: nn.Module, rows: slice, step: int) -> Tensor:
    x = torch.randn(16, 70, generator=torch.Generator().manual_seed(step))[rows]
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def steps_of_two(
    make: Any, dtype: torch.dtype, parts: int, released: bool, reshard: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every parameter before each step; after it of ranks that divide 16 rows, in so many parts; and of one process."""
    n, rank = dist.get_world_size(), dist.get_rank()
    models = sharded(dtype, reshard_after_forward=reshard), net(dtype)
    optimizers = [make(model.named_parameters()) for model in models]
    with ExitStack() as stack:
        for pair in zip(models, optimizers, strict=True) if released else ():
            stack.enter_context(optim.enable_gradient_release(*pair))
        for step in range(3):
            before = {k: p.detach().clone() for k, p in models[1].named_parameters()}
            size = 16 // n // parts
            for part in range(parts):
                models[0].set_requires_gradient_sync(part == parts - 1)
                first = (rank * parts + part) * size
                (batch_loss(models[0], slice(first, first + size), step) / parts).backward()
            batch_loss(models[1], slice(None), step).backward()
            for optimizer in () if released else optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for k, start in before.items():
                yield start, whole(models[0].get_parameter(k).detach()), models[1].get_parameter(k).detach()


def accuracy(names: list[str]) -> None:
    for name in names:
        for dtype, parts, released, reshard in (
            (torch.float32, 2, False, False),
            (torch.float32, 1, True, True),
            (torch.bfloat16, 1, False, True),
        ):
            make = partial(OPTIMIZERS[name], lr=1e-3, weight_decay=1e-2)
            for start, found, expected in steps_of_two(make, dtype, parts, released, reshard):
                assert found.isfinite().all()
                copies = [torch.empty_like(found) for _ in range(dist.get_world_size())]
                dist.all_gather(copies, found)
                assert all(torch.equal(copy, found) for copy in copies)
                if dtype == torch.float32:  # sums in another order, and now and then another code
                    assert relative(found - start, expected - start) < 1e-2, name
                else:  # bf16 gradients, averaged: the mean square that it allows the weights to differ by
                    assert relative(found, expected) < 1e-3**0.5, name


def test_each_rank_with_batches_of_its_own(ranks: Ranks) -> None:
    ranks.run(2, accuracy, [*OPTIMIZERS])


def fp32_weights(names: list[str]) -> None:
    """Out of 24 bits sharded, out of 32 whole."""
    for name, split in product(names, ("split24", "split32")):
        model = sharded()
        optimizer = OPTIMIZERS[name](model.named_parameters(), master_weights=split)
        train(model, optimizer, range(2))
        exact = optim.fp32_state_dict(model, optimizer)
        assert all(v.dtype == torch.float32 for v in exact.values())
        before = everything(model, optimizer)
        given = {k: whole(v).clone() if split == "split32" else v.clone() for k, v in exact.items()}
        for p in model.parameters():
            optimizer.set_master_weight(p, torch.zeros(p.shape))
        assert not any(whole(p.detach()).any() for p in model.parameters())
        optim.load_fp32_state_dict(model, optimizer, given)
        assert everything(model, optimizer) == before, name


def test_fp32_weights_come_back(ranks: Ranks) -> None:
    ranks.run(2, fp32_weights, [*OPTIMIZERS])


def through_dcp(folder: Path, names: list[str]) -> None:
    """bf16 weights without more, and with all 32 bits of their masters; those of 24 bits are in the matrix."""
    trained = {}
    for name, split in product(names, (None, "split32")):
        model = sharded()
        trained[f"{name} {split}"] = model, OPTIMIZERS[name](model.named_parameters(), master_weights=split)
        train(*trained[f"{name} {split}"], range(2))
    state = {key: state_of(*pair) for key, pair in trained.items()}
    expected = {key: everything(*pair) for key, pair in trained.items()}
    dcp.save(state, checkpoint_id=folder)
    for key, pair in trained.items():
        train(*pair, range(2, 3))
        assert everything(*pair) != expected[key]
    state = {key: state_of(*pair) for key, pair in trained.items()}
    dcp.load(state, checkpoint_id=folder)
    for key, (model, optimizer) in trained.items():
        set_model_state_dict(model, state[key]["model"])
        set_optimizer_state_dict(model, optimizer, state[key]["optim"])
        assert everything(model, optimizer) == expected[key], key
        (last,) = train(model, optimizer, range(2, 3))
        assert isfinite(last)
        assert all(whole(p.detach()).isfinite().all() for p in model.parameters())


def test_states_come_back_from_dcp(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, through_dcp, tmp_path, [*OPTIMIZERS])
