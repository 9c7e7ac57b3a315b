"""Peak memory of a training step: bytes of all live tensors (weights, gradients, states, scratch, activations).

    python benchmarks/optim_memory.py                  # benchmarks/results/optim_memory.json

Every storage that an operation returns is followed until it is freed; nothing is computed from formulas. The model is a
stack of bf16 (or fp32) linear layers with a batch of one, so that activations do not blur the picture; they are counted
all the same.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statecodec import optim


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive: those given to `watch`, and all that operations make in the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return result


def model(width: int, depth: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).to(dtype)


def measure(
    make: Callable[[Any], torch.optim.Optimizer], *, width: int, depth: int, dtype: torch.dtype, release: bool = False
) -> dict[str, float]:
    """Peak and resting bytes per parameter over three steps; the first creates the states."""
    gc.collect()
    net = model(width, depth, dtype)
    count = sum(p.numel() for p in net.parameters())
    optimizer = make(net.named_parameters())
    x = torch.randn(1, width).to(dtype)
    with LiveBytes() as live:
        for tensor in (*net.parameters(), x):
            live.watch(tensor)
        handle = optim.enable_gradient_release(net, optimizer) if release else nullcontext()  # type: ignore[arg-type]
        with handle:
            for _ in range(3):
                net(x).float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        rest = live.now
    return {"peak": round(live.peak / count, 3), "at_rest": round(rest / count, 3), "params": count}


def contenders() -> dict[str, tuple[Callable[[Any], torch.optim.Optimizer], torch.dtype, bool]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "torch AdamW, fp32": (lambda p: torch.optim.AdamW(p, foreach=False), fp32, False),
        "torch AdamW, fp32, foreach": (lambda p: torch.optim.AdamW(p, foreach=True), fp32, False),
        "AdamW, fp32": (optim.AdamW, fp32, False),
        "AdamW": (optim.AdamW, bf16, False),
        "AdamW, gradient release": (optim.AdamW, bf16, True),
        "AdamW split32": (lambda p: optim.AdamW(p, master_weights="split32"), bf16, False),
        "SGD momentum": (lambda p: optim.SGD(p, momentum=0.9), bf16, False),
        "SGD momentum, gradient release": (lambda p: optim.SGD(p, momentum=0.9), bf16, True),
        "Lion": (optim.Lion, bf16, False),
        "Lion, gradient release": (optim.Lion, bf16, True),
        "FOAM level 2": (lambda p: optim.FOAM(p, level=2), bf16, False),
        "FOAM level 2 companded8, gradient release": (
            lambda p: optim.FOAM(p, level=2, moments="companded8"),
            bf16,
            True,
        ),
        "SlimAdam companded8": (lambda p: optim.SlimAdam(p, rules={"*": [1]}, moments="companded8"), bf16, False),
        "LoRA-Pre rank 32": (lambda p: optim.LoRAPre(p, rank=32), bf16, False),
        "Muon": (optim.Muon, bf16, False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=24)
    args = parser.parse_args()
    from common import record

    rows = {}
    for name, (make, dtype, release) in contenders().items():
        rows[name] = measure(make, width=args.width, depth=args.depth, dtype=dtype, release=release)
        print(f"{name:45s} peak {rows[name]['peak']:6.3f}  at rest {rows[name]['at_rest']:6.3f} B/param", flush=True)
    record("optim_memory", {"width": args.width, "depth": args.depth, "bytes_per_param": rows})


if __name__ == "__main__":
    main()
