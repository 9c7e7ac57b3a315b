"""Fused steps as compiled for sm_90, interpreted, against the generic path: prints where they differ, as JSON.

A script for a process of its own, like `sm90.py`: python -m tests.kernels.ptx.steps [CASE ...]
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from statecodec import optim
from statecodec.kernels.triton import runtime
from tests.kernels.ptx.machine import Machine
from tests.kernels.sm90 import Driver
from tests.kernels.test_fused import NIBBLES, differences, train

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "Lion": (optim.Lion, {"lr": 1e-3, "weight_decay": 0.1}),
    "FOAM": (optim.FOAM, {"lr": 1e-2, "level": 2}),
    "FOAM 8-bit": (optim.FOAM, {"lr": 1e-2, "level": 1, "moments": "companded8"}),
    "SGD": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD dense": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-2, "moments": "dense"}),
    "Lion stochastic": (optim.Lion, {"lr": 1e-3, "stochastic_rounding": True, "seed": 7}),
    "SlimAdam": (optim.SlimAdam, {"lr": 1e-2, "weight_decay": 0.1}),
    "AdamW 4-bit": (optim.AdamW, {"lr": 1e-2, "moments": NIBBLES}),
}
SHAPES = [(5, 64), (3, 96), (32,)]
COMPILE = JITFunction.run


class Launches:
    """Stands in for JITFunction.run: compiles, and interprets every block on the tensors' own memory."""

    def __init__(self) -> None:
        self.machines: dict[str, Machine] = {}
        self.names = set[str]()

    def run(self, function: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = COMPILE(function, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in self.machines:
            self.machines[compiled.hash] = Machine(compiled.asm["ptx"], compiled.metadata.shared)
        self.names.add(function.__name__)
        params = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
        for block in range(grid[0]):
            self.machines[compiled.hash].run(block, params)


def gradients(step: int, i: int, shape: tuple[int, ...], grid: float = 0.0) -> Tensor:
    """Many orders of magnitude, a row of zeros, numbers that are not finite.

    On a grid, the squares of a row add up without rounding, so that their order does not matter.
    """
    g = torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + i))
    if grid:
        g = (g / grid).round() * grid
    g *= 2.0 ** torch.linspace(-20, 10, shape[0]).round().view(-1, *[1] * (len(shape) - 1))
    if i == 0:
        g[1] = 0
    if i == 1 and step > 0:
        g.view(-1)[40 * step] = (torch.nan, torch.inf, -1e30)[step % 3]
    return g


def main() -> None:
    launches = Launches()
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = lambda function, *args, **kwargs: launches.run(function, *args, **kwargs)
    runtime.INTERPRETED = True  # kernels are compiled as for a GPU, and run here
    found = {}
    for name in sys.argv[1:] or CASES:
        make, options = CASES[name]
        given = partial(gradients, grid=0.125 if make is optim.SlimAdam else 0.0)
        generic, fused = (
            train(make, torch.device("cpu"), torch.bfloat16, f, shapes=SHAPES, gradients=given, **options)
            for f in (False, True)
        )
        found[name] = differences(generic, fused)
        assert fused[0].skipped() == generic[0].skipped() != {}
    print(json.dumps({"differences": found, "kernels": sorted(launches.names)}))


if __name__ == "__main__":
    main()
