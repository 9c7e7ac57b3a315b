"""DistributedDataParallel on two gloo ranks: the bits of one process that sees both halves of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from statecodec import optim
from tests.distributed.ranks import Ranks

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: optim.AdamW(p, lr=1e-2, dense_below=0, stochastic_rounding=True),
    "foam": lambda p: optim.FOAM(p, lr=1e-2, dense_below=0, moments="companded8"),
    "slimadam": lambda p: optim.SlimAdam(p, lr=1e-2, rules={"*.weight": [1]}),
    "lorapre": lambda p: optim.LoRAPre(p, lr=1e-2, rank=4),
    "muon": lambda p: optim.Muon(p, lr=1e-2, dense_below=0),
}
STEPS = 4


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 8)).to(torch.bfloat16)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None) -> None:
    for step in range(STEPS):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        halves = (x[:8], x[8:]) if rank is None else ((x[:8], x[8:])[rank],)
        for half in halves:  # one process accumulates the two halves, as the reducer adds the two ranks
            (net(half).float().square().mean() / len(halves)).backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(folder: Path) -> None:
    rank = dist.get_rank()
    for name, make in OPTIMIZERS.items():
        net = model()
        wrapped = nn.parallel.DistributedDataParallel(net)
        optimizer = make(wrapped.named_parameters())
        train(wrapped, optimizer, rank)
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"{name}{rank}.pt")


@pytest.fixture(scope="module")
def folder(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ddp")
    ranks.run(2, worker, path)
    return path


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return bool(a == b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_ranks_hold_the_same_bits(name: str, folder: Path) -> None:
    ranks = [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]
    assert equal(ranks[0]["model"], ranks[1]["model"])
    assert equal(ranks[0]["optimizer"]["state"], ranks[1]["optimizer"]["state"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_are_one_process(name: str, folder: Path) -> None:
    """Up to the rounding of bf16 gradient sums, which the reducer does in another order."""
    net = model()
    optimizer = OPTIMIZERS[name](net.named_parameters())
    train(net, optimizer, None)
    found = torch.load(folder / f"{name}0.pt", weights_only=True)["model"]
    start = model().state_dict()
    for k, p in net.state_dict().items():
        moved, exact = (found[k] - start[k]).float(), (p - start[k]).float()
        assert exact.norm() > 0
        assert (moved - exact).norm() < 0.05 * exact.norm(), k
