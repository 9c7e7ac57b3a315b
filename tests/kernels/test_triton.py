"""The Triton backend as a whole: what it refuses, and that every kernel compiles for sm_90 as it should."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import statecodec

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


def compiled(*arguments: str, **environment: str) -> tuple[list[dict[str, Any]], str]:
    """What `sm90.py` found, and what it says beside."""
    done = run(str(HERE / "sm90.py"), "--arch", "90", "--only", *arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


def oldest_triton() -> Path:
    """Where the oldest triton that pyproject.toml allows lies; `make test` fetches it."""
    root = HERE.parents[1]
    oldest = re.search(r"triton>=([\d.]+)", (root / "pyproject.toml").read_text())[1]  # type: ignore[index]
    found = sorted((root / ".triton").glob(f"{oldest}.*"))
    if not found:
        pytest.skip(f"no triton {oldest} in .triton, where `make test` puts it")
    return found[0]


def test_compiles_under_the_oldest_triton() -> None:
    """An old one understands less of the language."""
    oldest = oldest_triton()
    rows, said = compiled("ends", "--plain", PYTHONPATH=str(oldest))
    assert f"triton {oldest.name}" in said
    assert {row["kernel"] for row in rows} == {
        "begin", "step_words", "step_elements", "squares", "share", "_encode", "_decode"
    }  # fmt: skip
    assert all(row["faults"] == [] for row in rows), rows


@pytest.mark.slow
def test_compiles_for_sm90() -> None:
    """A kernel compiles whatever Triton knows of an integer argument, and flushes, approximates and contracts nothing.

    No flushed subnormals, no approximate division, and no contraction beyond the fused operations that are written. The
    whole list, for three architectures and the oldest triton too, takes minutes: `make sm90`.
    """
    rows, _ = compiled("few")
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
    rows = [row for row in compiled("fast")[0] if row["kernel"] == "step_words" and row["as_launched"]]
    assert len(rows) == 5
    for row in rows:
        assert row["slots_per_element"] <= 90, row
        assert row["registers"] <= 64, row
        assert row["spills"] == row["loop_calls"] == row["loop_barriers"] == row["loop_branches"] == 0, row
        assert row["loads_of_16_bytes"] >= 2, row
        assert row["faults"] == [], row


def test_functions_take_few_arguments() -> None:
    """What is known when a kernel is compiled is one record, what changes from step to step lies in tables."""
    for path in (Path(statecodec.__file__).parent / "kernels" / "triton").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                given = function.args
                names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                assert len(names) <= 8, (path.name, function.name, names)
