"""The demo in five acts: train, compress, restore, resume from both, compare."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from statecodec_cli import console, tables
from statecodec_cli.grid import Column, TextRow, TextTable
from statecodec_cli.progress import messages

if TYPE_CHECKING:
    from statecodec_cli.demo.train import Trainer

PRESETS = ("lossless", "resume", "small", "tiny")
_RESUMED = "resume"  # the preset whose restored file is trained on


@dataclass(frozen=True)
class Schedule:
    """How long to train, how far to go on afterwards (a third of the seconds at most), and the seed."""

    steps: int
    seconds: float
    resume_steps: int
    seed: int


def tell(directory: Path, plan: Schedule, *, force: bool, quiet: bool) -> dict[str, Any]:
    """Run the demo in `directory` and return its document. Raises OutputExists unless `force`."""
    say: Callable[[str], None] = (lambda message: None) if quiet else console.say
    checkpoint = directory / "ckpt.pt"
    packed = {preset: directory / f"ckpt.{preset}.sc.safetensors" for preset in PRESETS}
    restored = {preset: directory / f"restored.{preset}.pt" for preset in ("lossless", _RESUMED)}
    _refuse_existing([checkpoint, *packed.values(), *restored.values()], force=force)

    from statecodec_cli.demo.data import standard_library
    from statecodec_cli.demo.train import TrainConfig, Trainer

    directory.mkdir(parents=True, exist_ok=True)

    say(f"1/5 training a small GPT on Python's own sources: {plan.steps} steps, {plan.seconds:.0f} s at most")
    corpus = standard_library()
    trainer = Trainer(TrainConfig(seed=plan.seed), corpus=corpus)
    training = _train(trainer, plan, checkpoint, say)

    say(f"2/5 compressing {checkpoint} ({console.size(training['bytes'])}) with {', '.join(PRESETS)}")
    presets = []
    with messages(say):
        for preset in PRESETS:
            report = _compress(checkpoint, packed[preset], preset)
            presets.append(report)
            say(f"    {preset:8}  {console.size(report['bytes'])}, {console.ratio(training['bytes'], report['bytes'])}")
    say(f"3/5 restoring {' and '.join(path.name for path in restored.values())}")
    same = _restore(checkpoint, packed, restored)
    steps, seconds = plan.resume_steps, plan.seconds / 3
    resumed: dict[str, Any] = {}
    for act, (name, path) in enumerate({"exact": checkpoint, "restored": restored[_RESUMED]}.items(), 4):
        say(f"{act}/5 resuming from {path} for {steps} steps")
        run = Trainer.resume(path, corpus=corpus)
        losses = _run(run, steps, seconds, _reporter(say, steps))
        resumed[name] = {"path": str(path), "losses": losses, "val_loss": run.validate()}
        steps, seconds = len(losses), math.inf  # the second run takes as many steps as the first had time for
    return {
        "training": training, "presets": presets, "lossless_same_sha256": same, "resumed": resumed,
        "difference": _difference(resumed["exact"], resumed["restored"]),
    }  # fmt: skip


def _run(trainer: Trainer, steps: int, seconds: float, on_step: Callable[[int, float], None]) -> list[float]:
    """Take so many steps, fewer if the time is up before; return their losses."""
    end = time.perf_counter() + seconds
    losses = trainer.run(1, on_step)
    while len(losses) < steps and time.perf_counter() < end:
        losses += trainer.run(1, on_step)
    return losses


def _train(trainer: Trainer, plan: Schedule, checkpoint: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train as planned, save, and say how it went."""
    started = time.perf_counter()
    _run(trainer, plan.steps, plan.seconds, _reporter(say, plan.steps))
    val_loss = trainer.validate()
    trainer.save(checkpoint)
    return {
        "steps": trainer.step, "num_params": trainer.num_params, "seconds": time.perf_counter() - started,
        "first_loss": trainer.losses[0], "final_loss": trainer.losses[-1], "val_loss": val_loss,
        "checkpoint": str(checkpoint), "bytes": checkpoint.stat().st_size,
    }  # fmt: skip


def summary(document: Mapping[str, Any]) -> list[RenderableType]:
    """The document as two tables and a verdict."""
    training, difference = document["training"], document["difference"]
    head = TextRow(
        Text.assemble((training["checkpoint"], "bold"), f"  {console.size(training['bytes'])}"),
        f"{training['num_params']:,} parameters",
        f"{training['steps']} steps",
        f"loss {training['first_loss']:.3f} -> {training['final_loss']:.3f}",
        f"validation {training['val_loss']:.3f}",
    )
    columns = (
        Column("preset", text=True),
        Column("size"), Column("ratio"), Column("B/param", drop=1), Column("update, of a step"),
        Column("max |u|", drop=1), Column("exact max |u|", drop=2),
    )  # fmt: skip
    rows = [
        (
            p["preset"],
            console.size(p["bytes"]),
            console.ratio(training["bytes"], p["bytes"]),
            f"{p['bytes_per_param']:.2f}",
            *tables.update_cells(p["update"])[:3],
        )
        for p in document["presets"]
    ]
    verdict = "the same SHA-256" if document["lossless_same_sha256"] else "ANOTHER SHA-256"
    curves = TextTable(
        [*map(Column, ("step", "exact file: loss", "restored file: loss", "difference"))], _curve(document)
    )
    last = TextRow(
        "validation loss",
        Text.assemble("exact ", (f"{document['resumed']['exact']['val_loss']:.5f}", "bold")),
        Text.assemble("restored ", (f"{document['resumed']['restored']['val_loss']:.5f}", "bold")),
        f"difference {difference['val_loss']:+.1e}",
    )
    lossless = Text(f"restored from lossless: {verdict} as {training['checkpoint']}")
    packed = next(p["path"] for p in document["presets"] if p["preset"] == _RESUMED)
    after = Text(f"next: statecodec inspect {packed}, or statecodec compress on a checkpoint of yours", style="dim")
    return [head, TextTable(columns, rows), lossless, curves, last, Text(), after]


def _curve(document: Mapping[str, Any], rows: int = 8) -> list[tuple[str, ...]]:
    exact, restored = document["resumed"]["exact"]["losses"], document["resumed"]["restored"]["losses"]
    every = max(1, len(exact) // rows)
    start = document["training"]["steps"]
    picked = sorted({0, *range(every - 1, len(exact), every), len(exact) - 1})
    return [
        (str(start + i + 1), f"{exact[i]:.5f}", f"{restored[i]:.5f}", f"{restored[i] - exact[i]:+.1e}") for i in picked
    ]


def _compress(checkpoint: Path, target: Path, preset: str) -> dict[str, Any]:
    import statecodec

    report = statecodec.compress(checkpoint, target, preset=preset, force=True).to_json()
    total = statecodec.diff(checkpoint, target).to_json()["total"]
    keep = ("path", "bytes", "ratio", "bytes_per_param", "seconds")
    return {"preset": preset, **{key: report[key] for key in keep}, "update": total}


def _restore(checkpoint: Path, packed: Mapping[str, Path], restored: Mapping[str, Path]) -> bool:
    """Restore what is asked for; True if the lossless one is the original bit for bit."""
    import statecodec

    for preset, path in restored.items():
        statecodec.restore(packed[preset], path, force=True)
    return _sha256(checkpoint) == _sha256(restored["lossless"])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _difference(exact: Mapping[str, Any], restored: Mapping[str, Any]) -> dict[str, float]:
    gaps = [b - a for a, b in zip(exact["losses"], restored["losses"], strict=True)]
    return {
        "final_loss": gaps[-1],
        "largest": max(gaps, key=abs),
        "val_loss": restored["val_loss"] - exact["val_loss"],
    }


def _refuse_existing(paths: list[Path], *, force: bool) -> None:
    from statecodec.errors import OutputExists

    there = [path for path in paths if path.exists()]
    if there and not force:
        raise OutputExists(f"{there[0]} exists; choose another --dir, or --force to replace the demo's own files")


def _reporter(say: Callable[[str], None], steps: int) -> Callable[[int, float], None]:
    """Say the loss at the first step and five times on the way."""
    every = max(1, steps // 5)
    calls = itertools.count(1)

    def on_step(step: int, loss: float) -> None:
        call = next(calls)
        if call == 1 or call % every == 0:
            say(f"    step {step:4d}  loss {loss:.4f}")

    return on_step
