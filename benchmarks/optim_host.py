"""How long Python is busy with one step of many small tensors: ours with the launch stubbed, torch's AdamW beside it.

    python benchmarks/optim_host.py          -> results/optim_host.json

Needs no GPU. Every tensor has one element, so that next to nothing is computed; our kernels are replaced by nothing.
Times are CPU times of one thread. Gradients are new objects in new memory at every step, as after
`zero_grad(set_to_none=True)`, or the same ones.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # so that tensors on the CPU are taken

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import record
from torch import nn

from statecodec import optim
from statecodec.kernels.triton import fast, general, tables

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Nothing:
    """Stands in for a kernel."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


CONTENDERS: dict[str, tuple[Make, torch.dtype]] = {
    "statecodec AdamW": (lambda ps: optim.AdamW(ps, lr=1e-4, fused=True, dense_below=0), torch.bfloat16),
    "torch AdamW, fused": (lambda ps: torch.optim.AdamW(ps, lr=1e-4, fused=True), torch.float32),
    "torch AdamW, foreach": (lambda ps: torch.optim.AdamW(ps, lr=1e-4, foreach=True), torch.float32),
}


def measure(make: Make, dtype: torch.dtype, count: int, fresh: bool, steps: int) -> dict[str, float]:
    """Milliseconds a step: the least, and the median."""
    params = [nn.Parameter(torch.zeros(1, dtype=dtype)) for _ in range(count)]
    optimizer = make(params)
    kept: list[list[torch.Tensor]] = [[torch.ones_like(p) for p in params] for _ in range(2 if fresh else 1)]
    times = []
    for step in range(steps):
        for p, g in zip(params, kept[step % len(kept)], strict=True):
            p.grad = g.view(1) if fresh else g
        started = time.thread_time()
        optimizer.step()
        times.append(1e3 * (time.thread_time() - started))
    times = times[3:]
    return {"least_ms": round(min(times), 3), "median_ms": round(statistics.median(times), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fast.step_words = general.step_elements = tables.begin = Nothing()
    rows: list[dict[str, Any]] = []
    for name, (make, dtype) in CONTENDERS.items():
        for count in (200, 2000):
            for fresh in (True, False):
                found = measure(make, dtype, count, fresh, options.steps)
                rows.append({"optimizer": name, "tensors": count, "fresh_gradients": fresh, **found})
                print(rows[-1], flush=True)
    record("optim_host", {"rows": rows})


if __name__ == "__main__":
    main()
