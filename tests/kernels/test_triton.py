"""The Triton backend as a whole: what it refuses, and that every kernel compiles for sm_90 as it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, without the interpreter unless asked for."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=250)


REFUSAL = """
import torch
from statecodec import kernels
from statecodec.errors import BackendUnavailable
backend = kernels.get("triton")
try:
    backend.decode_split(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int8), torch.zeros(3))
except BackendUnavailable as error:
    print(error)
"""


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    done = run("-c", REFUSAL)
    assert done.returncode == 0, done.stderr
    assert "needs CUDA tensors" in done.stdout
    assert run("-c", REFUSAL, TRITON_INTERPRET="1").stdout == ""


def compiled(only: str) -> list[dict[str, Any]]:
    done = run(str(HERE / "sm90.py"), "--only", only, "--arch", "90")
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_compiles_for_sm90() -> None:
    """A kernel compiles whatever Triton knows of an integer argument, and flushes, approximates and contracts nothing.

    No flushed subnormals, no approximate division, and no contraction beyond the fused operations that are written. The
    whole list, for three architectures and the oldest triton too, takes minutes: `make sm90`.
    """
    rows = compiled("few")
    assert rows
    assert all(row["faults"] == [] for row in rows), rows
    for kernel, slots in (("_encode uniform", 36), ("_encode logarithmic", 44), ("_encode compare", 20)):
        found = [row for row in rows if row["kernel"] == kernel and row["as_launched"]]
        assert found
        for row in found:
            assert row["slots_per_element"] <= slots, row
            assert row["spills"] == row["loop_calls"] == row["loop_barriers"] == row["loop_branches"] == 0, row
            assert row["loads_of_16_bytes"] >= 4, row


@pytest.mark.slow
def test_the_fast_steps_stay_within_their_budget() -> None:
    """Without a GPU, from the machine code: at copy speed an H100 has about 98 issue slots an element."""
    rows = [row for row in compiled("fast") if row["kernel"] == "step_words" and row["as_launched"]]
    assert len(rows) == 5
    for row in rows:
        assert row["slots_per_element"] <= 90, row
        assert row["registers"] <= 64, row
        assert row["spills"] == row["loop_calls"] == row["loop_barriers"] == row["loop_branches"] == 0, row
        assert row["loads_of_16_bytes"] >= 2, row
        assert row["faults"] == [], row
