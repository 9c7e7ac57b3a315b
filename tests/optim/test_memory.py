"""Bytes per parameter of a training step, measured with the benchmark's meter on a small model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from statecodec import optim


@pytest.fixture(scope="module")
def meter() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "optim_memory.py"
    spec = importlib.util.spec_from_file_location("optim_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_meter_follows_storages(meter: Any) -> None:
    with meter.LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[:10]
        b = a + 1
        assert live.now == 8000
        del a
        assert live.now == 8000  # the view holds it
        del view, b
        assert live.now == 0
        assert live.peak == 8000


# 2 weight + 1 low + 2.125 moments, + 2 gradients or (released) two of ten layers' gradients; scratch is under 0.3 a
# parameter here.
PEAKS = {
    "adamw": (optim.AdamW, False, 7.125),
    "adamw released": (optim.AdamW, True, 5.125),
    "lion": (optim.Lion, False, 6.0625),
    "lion released": (optim.Lion, True, 4.0625),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak(meter: Any, name: str) -> None:
    make, release, expected = PEAKS[name]
    found = meter.measure(make, width=640, depth=10, dtype=torch.bfloat16, release=release)
    slack = 0.3 + (0.42 if release else 0.0)
    assert expected < found["peak"] < expected + slack
