"""Many small tensors: nothing grows with the square of their number, and no file grows by more than a fixed header."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import statecodec

FIXED = 512  # bytes that a file may grow by, whatever is in it


def scheduler() -> Any:
    optimizer = torch.optim.AdamW(nn.Linear(3, 4).parameters())
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9).state_dict()


def trained() -> Any:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("make", [scheduler, trained, lambda: {"step": 1}, lambda: torch.randn(3)], ids=range(4))
def test_a_file_never_grows_by_more_than_a_fixed_header(tmp_path: Path, make: Callable[[], Any]) -> None:
    torch.save(make(), tmp_path / "x.pt")
    report = statecodec.compress(tmp_path / "x.pt", preset="lossless")
    assert report.bytes <= (tmp_path / "x.pt").stat().st_size + FIXED


@pytest.mark.parametrize("numel", [1, 7, 900])
def test_tensors_cost_less_than_their_own_header(tmp_path: Path, numel: int) -> None:
    tensors = {f"layers.{i // 8}.experts.{i % 8}.bias": torch.randn(numel) for i in range(500)}
    save_file(tensors, tmp_path / "x.safetensors")
    report = statecodec.compress(tmp_path / "x.safetensors", preset="lossless")
    assert report.bytes <= 500 * (4 * numel + 12) + FIXED
    statecodec.restore(report.path, tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def calls(work: Callable[[], Any]) -> int:
    """Function calls of this thread, Python's and C's: a measure of time that no other work on the machine changes."""
    count = 0

    def event(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(event)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_work_grows_with_the_number_of_tensors(tmp_path: Path) -> None:
    """Eight times as many may take twelve times the calls; with the square it would be 64 times."""
    source, packed = tmp_path / "x.pt", tmp_path / "x.sc.safetensors"
    verbs: dict[str, Callable[[], Any]] = {
        "compress": lambda: statecodec.compress(source, packed, force=True, threads=1),
        "verify": lambda: statecodec.verify(packed, threads=1),
        "load": lambda: statecodec.load(packed),
        "restore": lambda: statecodec.restore(packed, tmp_path / "y.pt", force=True, threads=1),
    }

    def measured(count: int) -> dict[str, int]:
        layers = {f"l.{i}": torch.full((1,), float(i)) for i in range(count)}
        state = {i: {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)} for i in range(count)}
        group = {"params": list(range(count)), "betas": (0.9, 0.99), "eps": 1e-8, "lr": 0.1}
        torch.save({"model": layers, "optimizer": {"state": state, "param_groups": [group]}}, source)
        return {name: calls(verb) for name, verb in verbs.items()}

    measured(10)  # compiles and imports
    few, many = measured(400), measured(3200)
    assert (tmp_path / "y.pt").read_bytes() == source.read_bytes()
    assert {name: many[name] / few[name] for name in verbs if many[name] > 12 * few[name]} == {}
