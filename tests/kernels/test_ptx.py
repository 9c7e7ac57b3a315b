"""The program that a GPU would run, bit for bit the generic path: compiled for sm_90, interpreted here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

from tests.kernels.ptx.machine import fused, toward_zero


def test_compiled_steps_equal_the_generic_path() -> None:
    """Approximate instructions are off by up to an ulp at random; the corrections have to make up for that."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ptx.steps"]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
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
    assert all(some == [] for some in found["differences"].values()), found
    assert found["kernels"] == ["begin", "share", "squares", "step_elements", "step_words"]


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
