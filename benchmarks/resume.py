"""Does training go on as if nothing had happened?

Resume from restored checkpoints, under every preset and at step errors from 0.3 % to a whole step, beside the exact
checkpoint, under several data orders. Every task (tasks.py) is trained once and saved. The checkpoint is compressed and
restored in each way, and each restored one is trained on in the same data order as the exact one. Two yardsticks: the
spread of exact resumes over data orders, and what one ulp does, a checkpoint whose weights were all moved to a
neighbouring fp32 number. Presets are also measured on GPTs that began with other weights and saw other data, one data
order each.

What is there already is not measured again: results are written after each run, and a second start goes on.

    python benchmarks/resume.py [--orders 3] [--variants small 0.1 ...] [TASK ...]    -> benchmarks/results/resume.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import CACHE, RESULTS, keep
from tasks import SEEDED, TASKS, TRAINED, Task, TaskRun

import statecodec

PRESETS = ("resume", "small", "tiny")
VARIANTS = (*PRESETS, "0.01", "0.1", "0.3", "1.0", "0.003", "0.03")  # in the order of their importance
ULP = "one ulp"
BEFORE, AFTER = 200, (8, 200)  # steps before the checkpoint is saved; steps after it at which to look
FOLDER = CACHE / "resume"


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=VARIANTS)
    parser.add_argument("tasks", nargs="*", default=[task.name for task in (*TASKS, *SEEDED)])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    tasks = [task for task in TASKS if task.name in arguments.tasks]
    for order in range(arguments.orders):
        for task in tasks:
            one_order(task, order, arguments.variants)
    for task in SEEDED:
        if task.name in arguments.tasks:
            one_order(task, task.seed, [variant for variant in PRESETS if variant in arguments.variants])


def one_order(task: Task, order: int, variants: Sequence[str]) -> None:
    """The exact resume in one data order, one from a neighbouring checkpoint, one from every way to compress it."""
    exact = resumed(task, saved(task), order, FOLDER / f"{task.name}-{order}.exact.pt")
    for variant in (ULP, *variants):
        if variant not in known()["tasks"].get(task.name, {}).get("orders", {}).get(str(order), {}):
            source, stored = made(task, variant)
            run = stored | compared(resumed(task, source, order), exact)
            result = known()  # anew: another process may have added to it
            found = result["tasks"].setdefault(task.name, {"about": task.about, "params": _params(task), "orders": {}})
            runs = found["orders"].setdefault(str(order), {"exact": exact["held out"]})
            runs[variant] = run
            keep("resume", result)
            print(f"{task.name}, data order {order}: {variant}: {run}", flush=True)


def saved(task: Task) -> Path:
    """The trained checkpoint."""
    path = FOLDER / f"{task.name}.pt"
    if not path.exists():
        run = TaskRun(task)
        losses = run.train(BEFORE, TRAINED + task.seed)
        print(f"{task.name}: trained to {losses[-1]:.3f}", flush=True)
        run.save(path)
    return path


def made(task: Task, variant: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint that is nearly the trained one, and what compressing it came to."""
    path = FOLDER / f"{task.name}.back.pt"
    if variant == ULP:
        run, generator = TaskRun.load(task, saved(task)), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in run.model.parameters():
                p.copy_(torch.nextafter(p, torch.randn(p.shape, generator=generator) * torch.inf))
        run.save(path)
        return path, {}
    packed = FOLDER / f"{task.name}.sc.safetensors"
    how: dict[str, Any] = {"max_step_error": float(variant)} if variant[0].isdigit() else {"preset": variant}
    report = statecodec.compress(saved(task), packed, force=True, **how)
    statecodec.restore(packed, path, force=True)
    total = {k: v for k, v in (report.total or {}).items() if k in ("u_rms", "weight_step_error")}
    return path, {"ratio": report.ratio, "bytes_per_param": report.bytes_per_param, **total}


def resumed(task: Task, path: Path, order: int, kept: Path | None = None) -> dict[str, Any]:
    """Go on training: the losses of all steps, held-out losses on the way, how far the weights have moved."""
    if kept is not None and kept.exists():
        found: dict[str, Any] = torch.load(kept, weights_only=True)
        return found
    run = TaskRun.load(task, path)
    losses: list[float] = []
    start, held_out = run.weights().clone(), {}
    for step in AFTER:
        losses += run.train(step - len(losses), order)
        held_out[str(step)] = run.held_out()
    made = {"losses": losses, "held out": held_out, "start": start, "end": run.weights().clone()}
    if kept is not None:
        torch.save(made, kept)
    return made


def compared(other: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """Gaps to the exact resume."""
    gaps = [a - b for a, b in zip(other["losses"], exact["losses"], strict=True)]
    moved = exact["end"] - exact["start"]
    return {
        "held_out_minus_exact": {step: other["held out"][step] - exact["held out"][step] for step in other["held out"]},
        "largest_loss_gap": max(map(abs, gaps[: AFTER[0]])),
        "mean_loss_gap": sum(gaps) / len(gaps),
        "path_deviation": float((other["end"] - exact["end"]).norm() / moved.norm()),
    }


def known() -> dict[str, Any]:
    """What was measured so far, if with the same settings."""
    path = RESULTS / "resume.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found.pop("machine", None)  # the one that is added to it is named instead
    settings = {"before": BEFORE, "after": list(AFTER)}
    return found if {k: found.get(k) for k in settings} == settings else {**settings, "tasks": {}}


def _params(task: Task) -> int:
    return sum(p.numel() for p in task.net().parameters())


if __name__ == "__main__":
    main()
