"""When a chain pays: links at stated step errors, by distance and by how late in training; whole chains.

It also says which loss after resuming belongs to which ratio (ExCP's 70x is the mark). A link restores to the same bits
as a file of its own, so the loss is a matter of the step error alone.

    python benchmarks/chain.py        -> benchmarks/results/chain.json
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CACHE, record
from tasks import TRAINED, Task, TaskRun, adamw, gpt, text

import statecodec

TASK = Task("gpt", partial(gpt, 4, 192), partial(adamw, 1e-3, 0.95), partial(text, 4), "GPT, AdamW")
FOLDER = CACHE / "chain"
PACKED = FOLDER / "packed"
STAGES = 60, 250, 400  # the learning rate has just come to its highest, is at its middle, and at its lowest
LATE = STAGES[-1]
DISTANCES = (1, 10, 50, 200)
EVERY = tuple(range(50, LATE + 1, 50))
LINKS = [(at, distance) for at in STAGES for distance in DISTANCES if distance < at]
SAVED = sorted({*EVERY, *STAGES, *(at - distance for at, distance in LINKS)})
FRACTIONS = (0.01, 0.1, 0.3, 1.0)
RESUMED, ORDERS = 50, 2


def main() -> None:
    """Measure and record."""
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    train()
    record(
        "chain",
        {
            "params": statecodec.inspect(checkpoint(LATE)).num_params,
            "resumed_steps": RESUMED,
            "links": [link(at, distance, f) for at, distance in LINKS for f in FRACTIONS],
            "chains": [chain(f) for f in FRACTIONS],
            "gaps": [gap(at, f) for at in STAGES for f in FRACTIONS],
        },
    )


def checkpoint(step: int) -> Path:
    """One checkpoint of the run."""
    return FOLDER / f"{step}.pt"


def train() -> None:
    """One run, saved on its way."""
    if all(checkpoint(s).exists() for s in SAVED):
        return
    run = TaskRun(TASK)
    for step in SAVED:
        run.train(step - run.step, TRAINED)
        run.save(checkpoint(step))


def emptied() -> None:
    """Make room for other bases: one that links stand on is not written over."""
    shutil.rmtree(PACKED, ignore_errors=True)
    PACKED.mkdir()


def compressed(step: int, fraction: float, base: Path | None = None, name: str = "alone") -> statecodec.Report:
    """A checkpoint as a file of its own, or as what changed since another."""
    path = PACKED / f"{name}.sc.safetensors"
    return statecodec.compress(checkpoint(step), path, max_step_error=fraction, base=base, force=True)


def link(at: int, distance: int, fraction: float) -> dict[str, Any]:
    """A link beside a file of its own."""
    emptied()
    base = compressed(at - distance, fraction, name="base")
    made, alone = compressed(at, fraction, Path(base.path), "link"), compressed(at, fraction)
    by_role = {
        role: [sum(t.bytes_after for t in r.tensors if t.role == role) for r in (alone, made)]
        for role in ("weight", "exp_avg", "exp_avg_sq")
    }
    return {
        "step": at, "distance": distance, "fraction": fraction, "alone": alone.bytes, "link": made.bytes,
        "ratio": made.ratio, "alone_and_link_by_role": by_role,
    }  # fmt: skip


def chain(fraction: float) -> dict[str, Any]:
    """All checkpoints, 50 steps apart: each a file of its own, or each but the first a link to the one before."""
    alone = [compressed(step, fraction).bytes for step in EVERY]
    before: Path | None = None
    emptied()
    links = []
    for step in EVERY:
        made = compressed(step, fraction, before, f"chain{step}")
        before = Path(made.path)
        links.append(made.bytes)
    source = sum(checkpoint(step).stat().st_size for step in EVERY)
    return {"fraction": fraction, "source": source, "alone": sum(alone), "chain": sum(links)}


def gap(at: int, fraction: float) -> dict[str, Any]:
    """The held-out loss after resuming from what a step error leaves, less that of the exact resume, per data order."""
    restored = FOLDER / "restored.pt"
    statecodec.restore(compressed(at, fraction).path, restored, force=True)
    gaps = [resumed(restored, order) - resumed(checkpoint(at), order) for order in range(ORDERS)]
    return {"step": at, "fraction": fraction, "held_out_minus_exact": gaps}


def resumed(path: Path, order: int) -> float:
    """The held-out loss some steps on."""
    run = TaskRun.load(TASK, path)
    run.train(RESUMED, order)
    return run.held_out()


if __name__ == "__main__":
    main()
