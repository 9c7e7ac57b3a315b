"""`analyze --curve` against the files that `compress` makes: sizes, and the errors of weights, at four step errors.

The checkpoints are those of predicted.py but for the Llama.

    python benchmarks/curve.py        -> benchmarks/results/curve.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import resume
import torch
from common import CACHE, record, spent
from tasks import HALF_PRECISION, TASKS

import statecodec

FRACTIONS = (0.001, 0.01, 0.1, 1.0)


def main() -> None:
    """Measure and record."""
    torch.set_num_threads(1)
    resume.FOLDER.mkdir(parents=True, exist_ok=True)
    record("curve", {"cases": {task.about: case(resume.saved(task)) for task in (*TASKS, HALF_PRECISION)}})


def case(path: Path) -> dict[str, Any]:
    """Sizes of all tensors and errors of weights, as the curve has them and as a file does."""
    with spent() as estimating:
        curve = statecodec.analyze(path, snr=False, curve=True, threads=1).curve
    found: dict[str, Any] = {"bytes": path.stat().st_size, "seconds": estimating.cpu, "fractions": {}}
    for point in curve:
        if point.label is None and point.step_error in FRACTIONS:
            made = statecodec.compress(
                path, CACHE / "curve.sc.safetensors", max_step_error=point.step_error, force=True, threads=1
            )
            found["fractions"][f"{point.step_error:g}"] = {
                "estimated": point.nbytes,
                "made": sum(tensor.bytes_after for tensor in made.tensors),
                "estimated_weight_error": point.weight_step_error,
                "made_weight_error": (made.total or {}).get("weight_step_error"),
            }
    return found


if __name__ == "__main__":
    main()
