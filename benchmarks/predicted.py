"""What `--pack predicted` is worth: sizes and CPU seconds beside `--pack zstd`, on the checkpoints of other benchmarks.

The tasks of resume.py (tasks.py), as saved after 200 steps, and the Llama in bf16 that transformers' Trainer writes
(checkpoints.py). Times are the least of `--runs`, both ways in turns, one thread, CPU seconds of the whole process.

    python benchmarks/predicted.py [--runs 3]        -> benchmarks/results/predicted.json
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import frameworks
import resume
import torch
from common import CACHE, record, spent
from tasks import HALF_PRECISION, TASKS

import statecodec

FRACTIONS = (0.01, 0.1, 0.2, 0.3)
WAYS = ("zstd", "predicted")


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    resume.FOLDER.mkdir(parents=True, exist_ok=True)
    measured = {about: case(path, arguments.runs) for about, path in checkpoints()}
    record("predicted", {"runs": arguments.runs, "cases": measured})


def checkpoints() -> Iterator[tuple[str, Path]]:
    """What they are, and where they lie."""
    for task in (*TASKS, HALF_PRECISION):
        yield task.about, resume.saved(task)
    folder = CACHE / "llama"
    shutil.rmtree(folder, ignore_errors=True)
    yield "Llama in bf16, transformers' Trainer", frameworks.trainer("llama", frameworks.LR, folder, None)[0]


def case(path: Path, runs: int) -> dict[str, Any]:
    """Sizes at every step error, and times at the first of them."""
    packed, back = CACHE / "predicted.sc.safetensors", CACHE / "predicted.back"
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    nbytes = sum(p.stat().st_size for p in files)
    found: dict[str, Any] = {"bytes": nbytes, "fractions": {}, "seconds": {way: [1e9, 1e9] for way in WAYS}}
    for fraction in FRACTIONS:
        reports = {way: _compress(path, packed, way, fraction) for way in WAYS}
        found["fractions"][f"{fraction:g}"] = {
            way: {"ratio": report.ratio, "bytes_per_param": report.bytes_per_param} for way, report in reports.items()
        }
    for _ in range(runs):
        for way, least in found["seconds"].items():
            with spent() as compressing:
                _compress(path, packed, way, FRACTIONS[0])
            with spent() as restoring:
                statecodec.restore(packed, back, force=True, threads=1)
            least[:] = [min(a, b.cpu) for a, b in zip(least, (compressing, restoring), strict=True)]
            shutil.rmtree(back) if back.is_dir() else back.unlink()
    return found


def _compress(path: Path, packed: Path, way: str, fraction: float) -> statecodec.Report:
    return statecodec.compress(path, packed, pack=way, max_step_error=fraction, force=True, threads=1)


if __name__ == "__main__":
    main()
