"""How far losses are off after resuming DeepSpeed's ZeRO from a compressed checkpoint, and what else moves them as far.

A run trains BEFORE steps, saves, and goes on for AFTER; then again from the same checkpoint with its masters a single
fp32 number off (`ulp`), with its first moments rounded to bf16, compressed with several step errors, and in other data
orders. Each with several models.

    DS_ACCELERATOR=cpu python benchmarks/resume_zero.py        -> benchmarks/results/resume_zero.json
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import frameworks
import torch
from checkpoints import rounded
from common import CACHE, record
from frameworks import AFTER, BEFORE
from tasks import TRAINED

import statecodec

CASES = {"ZeRO-1, bf16": (1, True), "ZeRO-3, bf16": (3, True)}
SEEDS = (0, 1, 2)
ORDERS = (TRAINED + 1, TRAINED + 2, TRAINED + 3)
FRACTIONS = (0.001, 0.01, 0.1, 0.3)
Losses = list[float]  # of AFTER steps, and the held-out one


def main() -> None:
    """Measure every case with every seed."""
    cases = {name: [measured(*case, seed) for seed in SEEDS] for name, case in CASES.items()}
    record("resume_zero", {"steps before": BEFORE, "after": AFTER, "cases": cases})


def measured(stage: int, bf16: bool, seed: int) -> dict[str, Any]:
    """Largest gap of the losses of AFTER steps, and the gap of the held-out loss, for each way to resume."""
    folder = CACHE / "resume_zero"
    shutil.rmtree(folder, ignore_errors=True)

    frameworks.zero(stage, bf16, seed, [(None, TRAINED)], folder / "first")
    saved = folder / "first" / "saved"
    ways = dict(changed(saved, folder))
    runs = [(saved, TRAINED), *((path, TRAINED) for path in ways.values()), *((saved, order) for order in ORDERS)]
    exact, *resumed = frameworks.zero(stage, bf16, seed, runs, folder / "resumed")
    gaps = {name: gap(losses, exact) for name, losses in zip(ways, resumed, strict=False)}
    orders = [losses[-1] - exact[-1] for losses in resumed[len(ways) :]]
    print(stage, bf16, seed, gaps, orders, flush=True)
    return {"gaps": gaps, "orders": orders}


def gap(losses: Losses, exact: Losses) -> dict[str, float]:
    """The largest of the training losses' gaps, and that of the held-out loss."""
    gaps = [a - b for a, b in zip(losses, exact, strict=True)]
    return {"largest": max(map(abs, gaps[:-1])), "held out": gaps[-1]}


def changed(saved: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The checkpoint changed in every way."""
    yield "again", saved
    ways: dict[str, Callable[[Path], None]] = {"ulp": one_number_off, "bf16 moments": rounded}
    for name, change in ways.items():
        path = folder / name / saved.name
        shutil.copytree(saved, path)
        change(path)
        yield name, path
    for fraction in FRACTIONS:
        packed, path = folder / "packed.sc.safetensors", folder / f"{fraction}" / saved.name
        statecodec.compress(saved, packed, max_step_error=fraction, force=True)
        path.parent.mkdir()
        statecodec.restore(packed, path)
        yield str(fraction), path


def one_number_off(folder: Path) -> None:
    """Every fp32 master of a DeepSpeed checkpoint one number up or down, at random."""
    torch.manual_seed(0)
    for path in folder.rglob("*optim_states.pt"):
        saved = torch.load(path, weights_only=False)  # written a moment ago, by this script
        own = saved["optimizer_state_dict"]
        for master in own.get("single_partition_of_fp32_groups") or own["fp32_flat_groups"]:
            bits = master.view(torch.int32)
            bits += torch.where(master == 0, 0, 2 * torch.randint(0, 2, master.shape) - 1).int()
        torch.save(saved, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
