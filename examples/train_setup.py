"""What the training examples share: one command-line name per optimizer, progress, loss curves and a plot of them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from statecodec import optim

Make = Callable[[Any, float], torch.optim.Optimizer]

# Named parameters and a learning rate in, an optimizer out; the rate is a sensible one for small models.
OPTIMIZERS: dict[str, tuple[float, Make]] = {
    "torch-adamw": (1e-3, lambda p, lr: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.95))),
    "adamw": (1e-3, lambda p, lr: optim.AdamW(p, lr=lr, betas=(0.9, 0.95))),
    "adam": (1e-3, lambda p, lr: optim.Adam(p, lr=lr, betas=(0.9, 0.95))),
    "sgd": (1e-1, lambda p, lr: optim.SGD(p, lr=lr, momentum=0.9, nesterov=True)),
    "sgdw": (1e-1, lambda p, lr: optim.SGDW(p, lr=lr, momentum=0.9, weight_decay=1e-3)),
    "lion": (1e-3, lambda p, lr: optim.Lion(p, lr=lr, weight_decay=0.1)),
    "foam": (1e-2, lambda p, lr: optim.FOAM(p, lr=lr, betas=(0.9, 0.95), level=2)),
    "slimadam": (1e-3, lambda p, lr: optim.SlimAdam(p, lr=lr, rules={"*": [1]}, moments="companded8")),
    "lorapre": (3e-3, lambda p, lr: optim.LoRAPre(p, lr=lr, rank=8)),
    "lorapre-muon": (1e-2, lambda p, lr: optim.LoRAPre(p, lr=lr, rank=8, base="muon")),
    "muon": (1e-2, lambda p, lr: optim.Muon(p, lr=lr)),
}


def parser(description: str | None, steps: int) -> argparse.ArgumentParser:
    """The options that both examples have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adamw")
    result.add_argument("--lr", type=float, help="default: one that suits the optimizer")
    result.add_argument("--steps", type=int, default=steps)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--bf16", action="store_true", help="bf16 parameters (with split master weights)")
    result.add_argument("--release", action="store_true", help="step and free each gradient during the backward pass")
    result.add_argument("--curves", type=Path, help="add the loss curve to this file (default: none, or beside --plot)")
    result.add_argument("--plot", type=Path, help="draw all curves of the file: curves.svg, curves.png")
    return result


def make(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that was asked for, over the model's named parameters."""
    rate, factory = OPTIMIZERS[args.optimizer]
    return factory(list(model.named_parameters()), args.lr or rate)


def progress(steps: int, every: float = 5.0) -> Callable[[int, float], None]:
    """A function to call with each step (from 1) and its loss: it says how far the run is, every few seconds."""
    started = last = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if step == 1 or now - last >= every:
            last = now
            left = (now - started) / step * (steps - step)
            print(f"step {step} of {steps}  loss {loss:.4f}  {left:.0f} s left", file=sys.stderr, flush=True)

    return on_step


def report(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, losses: list[float], final: dict[str, float]
) -> None:
    """Print the outcome, add the curve to the file, draw the plot."""
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    state = optimizer.state_nbytes() if isinstance(optimizer, optim.StateOptimizer) else 8 * count
    name = args.optimizer + ("-bf16" if args.bf16 else "")
    print(json.dumps({"run": name, **final, "state_bytes_per_param": round(state / count, 3)}))
    file = args.curves or (args.plot and args.plot.with_suffix(".json"))
    if file is None:
        return
    curves = json.loads(file.read_text()) if file.exists() else {}
    curves[name] = losses
    file.write_text(json.dumps(curves))
    if args.plot:
        draw(curves, args.plot)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Smoothed losses over steps, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, losses in curves.items():
        smooth, value = [], losses[0]
        for loss in losses:
            value += 0.1 * (loss - value)
            smooth.append(value)
        axes.plot(smooth, label=name, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
