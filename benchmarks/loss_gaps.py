"""How far losses are off after resuming from `resume`, by how many tokens a loss is the mean of, and by what changed.

A GPT is trained for BEFORE steps, saved by torch.save, and goes on for AFTER steps; then again from what the compressed
checkpoint gives back: all of it, or one kind of its tensors with the rest unchanged. Eight grids of nearly the same
size show how much of a gap is chance.

    python benchmarks/loss_gaps.py        -> benchmarks/results/loss_gaps.json
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import frameworks
import torch
from common import CACHE, record
from frameworks import AFTER, BEFORE
from tasks import BLOCK

import statecodec
from statecodec.choose.presets import PRESETS

SEQUENCES = (8, 16, 32, 64)  # in a batch
GRIDS = (0.94, 0.96, 0.98, 0.99, 1.0, 1.01, 1.02, 1.04)  # times the errors of the preset
Saved = dict[str, Any]
Part = Callable[[Saved, Saved], None]  # puts what was restored in the place of what was saved


def main() -> None:
    """Measure every batch size."""
    gaps = {str(n * BLOCK): measured(n) for n in SEQUENCES}
    record("loss_gaps", {"steps before": BEFORE, "after": AFTER, "grids": GRIDS, "largest gap by tokens": gaps})


def weights(saved: Saved, restored: Saved) -> None:
    """The weights alone."""
    saved["model"] = restored["model"]


def moment(name: str, numbers: slice, saved: Saved, restored: Saved) -> None:
    """One moment alone, of some parameters by their numbers."""
    states, changed = saved["optimizer"]["state"], restored["optimizer"]["state"]
    for number in list(states)[numbers]:
        states[number][name] = changed[number][name]


def everything(saved: Saved, restored: Saved) -> None:
    """All that a restored checkpoint has."""
    saved.update(restored)


PARTS: dict[str, Part] = {
    "all": everything,
    "weights": weights,
    "exp_avg": partial(moment, "exp_avg", slice(None)),
    "exp_avg_sq": partial(moment, "exp_avg_sq", slice(None)),
    "exp_avg of the token embedding": partial(moment, "exp_avg", slice(1)),  # the first parameter
}


def measured(sequences: int) -> dict[str, list[float]]:
    """The largest of AFTER gaps, for every part and grid."""
    folder = CACHE / "loss_gaps"
    shutil.rmtree(folder, ignore_errors=True)
    with mock.patch.object(frameworks, "BATCH", sequences):
        path, _ = frameworks.plain(frameworks.adamw, folder / "run", None)
        exact = frameworks.plain(frameworks.adamw, folder, path)[1]
        found: dict[str, list[float]] = {part: [] for part in PARTS}
        for grid in GRIDS:
            restored = back(path, folder, grid)
            for part, put in PARTS.items():
                saved = torch.load(path, weights_only=True)
                put(saved, restored)
                torch.save(saved, folder / "changed.pt")
                again = frameworks.plain(frameworks.adamw, folder, folder / "changed.pt")[1]
                found[part].append(max(abs(a - b) for a, b in zip(exact, again, strict=True)))
    shutil.rmtree(folder)
    print(sequences * BLOCK, found, flush=True)
    return found


def back(path: Path, folder: Path, grid: float) -> Saved:
    """What the compressed checkpoint gives back, with errors of so many times the preset's."""
    budget, packed, restored = PRESETS["resume"].budget, folder / "packed.sc.safetensors", folder / "restored.pt"
    assert budget.moments is not None
    assert budget.weights is not None
    statecodec.compress(
        path, packed, max_update_error=grid * budget.moments, max_weight_error=grid * budget.weights, force=True
    )
    statecodec.restore(packed, restored, force=True)
    saved: Saved = torch.load(restored, weights_only=True)
    return saved


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
