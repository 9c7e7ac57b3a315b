"""Does training go on as if nothing had happened? Resume a GPT from the exact checkpoint and from restored ones, at
step errors from 1 % to a whole step.

For every seed and beta2: train, save, compress, restore, resume from each with the same data order, and compare
validation losses after some steps. The noise to compare with is the spread of exact resumes under other data orders.
Beside it the path: how far the weights have moved another way, ||dw' - dw|| / ||dw||.

    python benchmarks/resume.py [--seeds 3] [--before 250] [--after 200]        -> benchmarks/results/resume.json
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import CACHE, record, trained
from torch import Tensor

import statecodec
from statecodec_cli.demo.data import standard_library
from statecodec_cli.demo.gpt import GPTConfig
from statecodec_cli.demo.train import Trainer

FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
BETA2 = (0.95, 0.999)
MODEL = GPTConfig(n_layer=4, n_head=4, n_embd=160)


@dataclass(frozen=True)
class Resumed:
    """Where training was after a resume: the validation loss, and the weights."""

    loss: float
    weights: Tensor


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--before", type=int, default=250)
    parser.add_argument("--after", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [one_run(seed, beta2, arguments) for beta2 in BETA2 for seed in range(arguments.seeds)]
    record("resume", {
        "steps": [arguments.before, arguments.after], "seeds": arguments.seeds, "runs": runs,
        "data_order_sd": {str(b): _sd(runs, b) for b in BETA2},
    })  # fmt: skip


def one_run(seed: int, beta2: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One trained model: its exact resumes under three data orders, and a resume at every step error."""
    name = f"resume-{beta2}"
    path = trained(name, arguments.before, seed, model=MODEL, lr=1e-3, batch_size=12, beta2=beta2)
    before = weights(statecodec.load(path)["model"])
    exact = [resumed(path, 1000 * seed + order, arguments.after) for order in range(3)]
    print(f"seed {seed}, beta2 {beta2}: exact, three data orders: {[e.loss for e in exact]}", flush=True)
    found = {}
    for fraction in FRACTIONS:
        packed, back = CACHE / "resume.sc.safetensors", CACHE / "resume.back.pt"
        report = statecodec.compress(path, packed, max_step_error=fraction, force=True)
        statecodec.restore(packed, back, force=True)
        other = resumed(back, 1000 * seed, arguments.after)
        moved = exact[0].weights - before
        found[str(fraction)] = {
            "ratio": report.ratio, "bytes_per_param": report.bytes_per_param, **(report.total or {}),
            "loss_minus_exact": other.loss - exact[0].loss,
            "path_deviation": float((other.weights - exact[0].weights).norm() / moved.norm()),
        }  # fmt: skip
        print(f"seed {seed}, beta2 {beta2}: {fraction}: {found[str(fraction)]}", flush=True)
    return {"seed": seed, "beta2": beta2, "exact": [e.loss for e in exact], "fractions": found}


def resumed(path: Path, data_seed: int, steps: int) -> Resumed:
    """Go on training from a checkpoint under a data order."""
    trainer = Trainer.resume(path, corpus=standard_library())
    trainer.config = replace(trainer.config, seed=data_seed, eval_batches=16)
    trainer.run(steps)
    return Resumed(trainer.validate(), weights(trainer.model.state_dict()))


def weights(model: dict[str, Tensor]) -> Tensor:
    """All weights as one vector."""
    return torch.cat([w.detach().reshape(-1).float().clone() for w in model.values()])


def _sd(runs: list[dict[str, Any]], beta2: float) -> float:
    return statistics.mean(statistics.stdev(run["exact"]) for run in runs if run["beta2"] == beta2)


if __name__ == "__main__":
    main()
