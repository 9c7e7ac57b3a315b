"""What the live SNRTracker costs, and the figures that the published SNR data gives.

python benchmarks/snr.py        -> benchmarks/results/snr.json
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from common import record

import statecodec
from statecodec.choose.snr_tracker import paper_schedule
from statecodec_cli.demo.gpt import GPTConfig
from statecodec_cli.demo.train import TrainConfig, Trainer

TABLES = Path(__file__).parents[1] / "tests" / "choose" / "data"
RUN = 10_000


def main() -> None:
    """Measure and record."""
    record("snr", {"tracker": tracker(), "published": {lr: published(lr) for lr in ("0.0003", "0.003")}})


def tracker() -> dict[str, Any]:
    """Seconds of a training step, of a tracked step that is not measured, and of a measurement; the share in a run."""
    trainer = Trainer(TrainConfig(model=GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=64), batch_size=8))
    follow = statecodec.SNRTracker(trainer.optimizer, trainer.model.named_parameters())
    trainer.run(3)
    follow.step()  # step 1 is measured; the ones up to 100 are not
    steps = [timed(lambda: trainer.run(1)) for _ in range(15)]
    idle = timed(lambda: [follow.step() for _ in range(2, 100)]) / 98
    measured = [timed(follow.measure) for _ in range(8)]
    step, measure = statistics.median(steps), statistics.median(measured)
    count = sum(paper_schedule(s) for s in range(1, RUN + 1))
    return {
        "params": trainer.num_params, "step_seconds": step, "idle_seconds": idle, "measurement_seconds": measure,
        "measurements_in_run": count, "run_steps": RUN, "overhead": (count * measure + RUN * idle) / (RUN * step),
    }  # fmt: skip


def published(lr: str) -> dict[str, float]:
    """Share of second moments saved at cutoff 1 (GPT-2 small, SNRs averaged from the published tables)."""
    return statecodec.analyze(TABLES / f"slimadam_gpt2_lr{lr}.csv").saved


def timed(run: Any) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
