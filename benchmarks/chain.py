"""When a chain pays: links against files of their own, by distance and by how late in training; then how far residuals
and pruned moments go (ExCP's 70x is the mark), with the loss after resuming.

python benchmarks/chain.py        -> benchmarks/results/chain.json
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import CACHE, record

import statecodec
from statecodec_cli.demo.gpt import GPTConfig
from statecodec_cli.demo.train import TrainConfig, Trainer

STEPS = 600
FOLDER = CACHE / "chain"
SAVED = (250, 290, 299, 300, 550, 590, 599, 600)
DISTANCES = (1, 10, 50)
LADDER = (  # (max_weight_error, max_update_error, packing) of a link 50 steps after its base
    (3e-4, 0.01, "zstd"), (1e-3, 0.1, "zstd"), (3e-3, 0.3, "zstd"), (5e-3, 0.5, "zstd"), (1e-2, 0.7, "zstd:9"),
    (2e-2, 0.9, "zstd:9"), (3e-2, 0.95, "zstd:9"),
)  # fmt: skip
RESUMED = 20
SEEDS = range(2)


def main() -> None:
    """Measure and record."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    train()
    presets = ("lossless", "resume", "tiny")
    print("links ...", flush=True)
    links = [link(at, distance, preset) for at in (300, 600) for distance in DISTANCES for preset in presets]
    record("chain", {"params": params(), "links": links, **ladder()})


def checkpoint(step: int) -> Path:
    """One checkpoint of the run."""
    return FOLDER / f"{step}.pt"


def train() -> None:
    """A run whose learning rate falls to a tenth at its end."""
    if all(checkpoint(s).exists() for s in SAVED):
        return
    model = GPTConfig(n_layer=4, n_head=4, n_embd=192, block_size=64)
    trainer = Trainer(TrainConfig(batch_size=8, decay_steps=STEPS, model=model))
    for step in range(1, STEPS + 1):
        trainer.run(1)
        if step in SAVED:
            trainer.save(checkpoint(step))


def params() -> int:
    """Parameters of the model."""
    return statecodec.inspect(checkpoint(SAVED[0])).num_params


def link(at: int, distance: int, preset: str) -> dict[str, Any]:
    """A link against a file of its own."""
    base = statecodec.compress(checkpoint(at - distance), FOLDER / "base.sc.safetensors", preset=preset, force=True)
    made = statecodec.compress(
        checkpoint(at), FOLDER / "link.sc.safetensors", preset=preset, base=base.path, force=True
    )
    alone = statecodec.compress(checkpoint(at), FOLDER / "alone.sc.safetensors", preset=preset, force=True)
    by_role = {
        role: [sum(t.bytes_after for t in r.tensors if t.role == role) for r in (alone, made)]
        for role in ("weight", "exp_avg", "exp_avg_sq")
    }
    return {
        "step": at, "distance": distance, "preset": preset, "alone": alone.bytes, "link": made.bytes,
        "smaller": alone.bytes / made.bytes, "ratio": made.ratio, "alone_and_link_by_role": by_role,
    }  # fmt: skip


def ladder() -> dict[str, Any]:
    """Links 50 steps on, ever coarser: ratio, and the loss after resuming from them, paired with the exact resume."""
    source, base = checkpoint(600), FOLDER / "base.sc.safetensors"
    statecodec.compress(checkpoint(550), base, preset="resume", force=True)
    exact = [resumed(source, seed) for seed in SEEDS]
    rungs = []
    for weight, update, pack in LADDER:
        for previous in (base,) if weight != 1e-3 else (base, None):
            made = statecodec.compress(
                source, FOLDER / "rung.sc.safetensors", base=previous, max_weight_error=weight, max_update_error=update,
                pack=pack, force=True,
            )  # fmt: skip
            restored = FOLDER / "rung.pt"
            statecodec.restore(made.path, restored, force=True)
            losses = [resumed(restored, seed) for seed in SEEDS]
            print(f"rung {weight} {update}: {made.ratio:.1f}x", flush=True)
            gaps = {k: [r[k] - e[k] for r, e in zip(losses, exact, strict=True)] for k in ("at_once", "later")}
            rungs.append({
                "max_weight_error": weight, "max_update_error": update, "base": previous is not None, "pack": pack,
                "bytes": made.bytes, "ratio": made.ratio, "bytes_per_param": made.bytes_per_param,
                "loss_gap_at_once": statistics.mean(gaps["at_once"]), "loss_gap_later": statistics.mean(gaps["later"]),
                "worst_gap_later": max(gaps["later"], key=abs),
            })  # fmt: skip
    spread = statistics.stdev(e["later"] for e in exact)
    return {"resumed_steps": RESUMED, "sd_of_data_order": spread, "exact": exact, "ladder": rungs}


def resumed(path: Path, seed: int) -> dict[str, float]:
    """Validation loss at once, and after some steps in another order of the data."""
    trainer = Trainer.resume(path)
    trainer.config = replace(trainer.config, seed=seed, eval_batches=16)
    at_once = trainer.validate()
    trainer.run(RESUMED)
    trainer.config = replace(trainer.config, seed=0)
    return {"at_once": at_once, "later": trainer.validate()}


if __name__ == "__main__":
    main()
