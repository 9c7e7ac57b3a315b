"""The program that a GPU would run, bit for bit the generic path: compiled for sm_90, interpreted here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kernels.ptx.machine import Machine, fused, toward_zero
from tests.kernels.test_triton import oldest_triton


def interpreted(*cases: str, **environment: str) -> dict[str, Any]:
    """What `ptx/steps.py` found, of some cases or of all."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "tests.kernels.ptx.steps", *cases]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert all(some == [] for some in found["differences"].values()), found
    return found


def test_compiled_steps_equal_the_generic_path() -> None:
    """Approximate instructions are off by up to an ulp at random; the corrections have to make up for that."""
    found = interpreted()
    assert found["differences"].keys() == {
        "AdamW",
        "Lion",
        "FOAM",
        "FOAM 8-bit",
        "AdamW 4-bit",
        "SGD",
        "SGD dense",
        "Lion stochastic",
        "SlimAdam",
    }
    assert found["kernels"] == ["begin", "share", "squares", "step_elements", "step_words"]


def test_what_the_oldest_triton_makes_of_them() -> None:
    """Other instructions for the same programs."""
    found = interpreted("AdamW", "SGD dense", PYTHONPATH=str(oldest_triton()))
    assert found["kernels"] == ["begin", "step_elements", "step_words"]


@pytest.mark.parametrize(
    ("instruction", "result"),
    [
        ("red.global.gpu.relaxed.add.f32 [ %rd1 + 0 ], %r1", None),
        ("atom.global.gpu.relaxed.add.f32 %r2, [ %rd1 + 0 ], %r1", [10.0, 11.0, 13.0, 16.0]),
        ("@%p1 atom.global.gpu.relaxed.add.f32 %r2, [ %rd1 + 0 ], %r1", [None, 10.0, None, 12.0]),
    ],
)
def test_additions_in_memory(instruction: str, result: list[float | None] | None) -> None:
    """All threads to one place, in turn; an `atom` says what was there before, a `red` does not."""
    memory, added = np.array([10.0, 99.0], np.float32), np.array([1, 2, 3, 4], np.float32)
    machine = Machine(f".reqntid 4\n{{\n{instruction};\nret;\n}}", 0)
    given = {
        "%rd1": np.full(4, memory.ctypes.data, np.uint64),
        "%r1": added.view(np.uint32),
        "%p1": np.array([False, True, False, True]),
    }
    machine.run(0, (), given)
    chosen = [x is not None for x in result or [0.0] * 4]
    assert memory.tolist() == [10 + added[chosen].sum(), 99]
    found = machine.registers.get("%r2")
    assert (found is None) == (result is None)
    if found is not None:
        assert found.view(np.float32)[chosen].tolist() == [x for x in result or () if x is not None]


def test_bytes_chosen_by_a_register() -> None:
    """`prmt`, with another selector in each thread; 8 and more is the sign of a byte."""
    x = np.array([0x807F0180] * 4, np.uint32)
    selectors = np.array([0x3210, 0x0123, 0x8888, 0xB9A0], np.uint32)
    machine = Machine(".reqntid 4\n{\nprmt.b32 %r3, %r1, 0, %r2;\nret;\n}", 0)
    machine.run(0, (), {"%r1": x, "%r2": selectors})
    assert [hex(n) for n in machine.registers["%r3"]] == ["0x807f0180", "0x80017f80", "0xffffffff", "0xff000080"]


def test_a_fused_operation_rounds_once() -> None:
    """Against fractions, where rounding to fp64 first would give another fp32 number, and down to subnormal ones."""
    random = np.random.default_rng(0)
    a, b = ((random.integers(1 << 23, 1 << 24, 3000) * 2.0**-23).astype(np.float32) for _ in range(2))
    c = (random.choice([-1, 1], 3000) * 2.0 ** random.integers(-60, 30, 3000)).astype(np.float32)
    a[:500] *= np.float32(2.0**-70)
    b[:500] *= np.float32(2.0**-70)
    c[:500] *= np.float32(2.0**-90)
    down = toward_zero(fused(a, b, c))
    for x, y, z, near, low in zip(a, b, c, fused(a, b, c).astype(np.float32), down, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        beside = [np.nextafter(near, np.float32(to)) for to in (-np.inf, np.inf)]
        error = abs(Fraction(float(near)) - exact)
        assert all(error <= abs(Fraction(float(other)) - exact) for other in beside)
        assert abs(Fraction(float(low))) <= abs(exact) < abs(Fraction(float(np.nextafter(low, np.sign(low) * np.inf))))
