"""The training examples run, for an optimizer or two, and leave their curves and plot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, folder: Path, *options: str) -> dict[str, float]:
    command = [sys.executable, str(EXAMPLES / name), "--curves", str(folder / "c.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("step 1 of ") or "--resume" in options, "progress is seen from the first step on"
    result: dict[str, float] = json.loads(done.stdout)
    return result


def curves(folder: Path) -> dict[str, int]:
    return {k: len(v) for k, v in json.loads((folder / "c.json").read_text()).items()}


def test_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn bundles the digits")
    options = ("--optimizer", "adamw", "--steps", "30", "--bf16", "--release", "--plot", "digits.svg")
    assert example("train_digits.py", tmp_path, *options)["loss"] < 2.3
    assert curves(tmp_path) == {"adamw-bf16": 30}
    assert (tmp_path / "digits.svg").stat().st_size > 1000


def test_gpt_resumes_from_its_own_file(tmp_path: Path) -> None:
    options = ("--optimizer", "foam", "--batch-size", "2")
    example("train_gpt.py", tmp_path, *options, "--steps", "2", "--save", "half.sc.safetensors")
    example("train_gpt.py", tmp_path, *options, "--steps", "3", "--resume", "half.sc.safetensors")
    assert curves(tmp_path) == {"foam": 3}
