"""What the benchmarks of GPUs share: arguments, the device and its clock, what machine it is, results."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """A parser of what all of them take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rehearse", action="store_true", help="no GPU: does it run, on tiny sizes? Times mean nothing")
    made.add_argument("--output", type=Path, default=RESULTS / results, help="written row by row")
    return made


def device_of(rehearse: bool) -> torch.device:
    """The device to measure; the CPU in a rehearsal. Exits without either."""
    if rehearse and not INTERPRETED:
        sys.exit("a rehearsal needs TRITON_INTERPRET=1, set before Python starts")
    if rehearse:
        sys.path.append(str(RESULTS.parents[1]))
        importlib.import_module("tests.kernels.ptx.assembly").install()
    if not rehearse and (INTERPRETED or not torch.cuda.is_available()):
        sys.exit("needs a CUDA device, and no TRITON_INTERPRET; without one, --rehearse shows that it runs")
    return torch.device("cpu" if rehearse else "cuda")


class Clock:
    """Times of `body`, in milliseconds: CUDA events on a GPU, the wall clock elsewhere; and of Python alone."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, body: Callable[[], Any], steps: int) -> tuple[list[float], list[float]]:
        total, host = [], []
        for _ in range(steps):
            if self.cuda:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                first.record()
            started = time.perf_counter()
            body()
            host.append((time.perf_counter() - started) * 1e3)
            if self.cuda:
                last.record()
                torch.cuda.synchronize()
            total.append(first.elapsed_time(last) if self.cuda else host[-1])
        return total, host


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB (of 1 MiB without a GPU)."""
    source = torch.zeros(1 << (30 if clock.cuda else 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times, _ = clock(lambda: target.copy_(source), 20)
    return 2 * source.numel() / (statistics.median(times[5:]) * 1e-3)


def machine(device: torch.device) -> dict[str, Any]:
    """What these figures were measured on."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    for name in ("triton", "flashoptim", "bitsandbytes", "torchao"):
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
    if device.type != "cuda":
        return {"device": "none, a rehearsal: times mean nothing", **versions}
    gpu = torch.cuda.get_device_properties(device)
    return {"device": gpu.name, "multiprocessors": gpu.multi_processor_count, "l2_bytes": gpu.L2_cache_size, **versions}


def keep(result: dict[str, Any], path: Path) -> None:
    """Write what there is of a result, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
