"""Does training go on as if nothing had happened? Resume a GPT from the exact checkpoint and from each preset's
restored one.

For every seed: train, save, compress, restore, resume from both with the same data order, and compare the validation
losses. The noise to compare with is the spread of exact resumes under other data orders.

    python benchmarks/resume.py [--seeds 3] [--before 250] [--after 80]        -> benchmarks/results/resume.json
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from common import CACHE, record, trained

import statecodec
from statecodec_cli.demo.data import standard_library
from statecodec_cli.demo.gpt import GPTConfig
from statecodec_cli.demo.train import Trainer

PRESETS = ("resume", "small", "tiny")
MODEL = GPTConfig(n_layer=4, n_head=4, n_embd=160)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--before", type=int, default=250)
    parser.add_argument("--after", type=int, default=80)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = standard_library()

    def resumed(path: Path, data_seed: int) -> float:
        trainer = Trainer.resume(path, corpus=corpus)
        trainer.config = replace(trainer.config, seed=data_seed, eval_batches=16)
        trainer.run(arguments.after)
        return trainer.validate()

    exact: dict[int, list[float]] = {}
    gaps: dict[str, list[float]] = {p: [] for p in (*PRESETS, "optimizer state zeroed")}
    for seed in range(arguments.seeds):
        path = trained("resume", arguments.before, seed, model=MODEL, lr=1e-3, batch_size=12)
        exact[seed] = [resumed(path, 1000 * seed + order) for order in range(3)]
        print(f"seed {seed}: exact, three data orders: {exact[seed]}", flush=True)
        for name in gaps:
            packed, back = CACHE / "resume.sc.safetensors", CACHE / "resume.back.pt"
            preset = "weights" if name not in PRESETS else name
            statecodec.compress(path, packed, preset=preset, force=True)
            statecodec.restore(packed, back, force=True)
            gaps[name].append(resumed(back, 1000 * seed) - exact[seed][0])
            print(f"seed {seed}: {name}: {gaps[name][-1]:+.2e}", flush=True)
    noise = statistics.mean(statistics.stdev(orders) for orders in exact.values())
    record("resume", {
        "steps": [arguments.before, arguments.after], "seeds": arguments.seeds,
        "exact_validation_loss": exact, "data_order_sd": noise, "loss_minus_exact": gaps,
    })  # fmt: skip


if __name__ == "__main__":
    main()
