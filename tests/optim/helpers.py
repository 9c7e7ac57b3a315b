"""Small problems, and one row per optimizer for the tests that every one of them must pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from statecodec import optim
from statecodec.codecs import EncodedTensor

# Rows of 70 are no multiple of 32 or of a fold block, so every tail is exercised. dense_below=0 encodes the small
# tensors too.
SHAPES = {
    "a.weight": (24, 70),
    "a.bias": (24,),
    "b.weight": (40, 24),
    "conv.weight": (6, 5, 3, 3),
    "embed.weight": (50, 16),
}

Make = Callable[[Any], optim.StateOptimizer]


def _small(cls: Any, **options: Any) -> Make:
    return lambda params: cls(params, **{"dense_below": 0, **options})


EVERY: dict[str, Make] = {
    "adamw": _small(optim.AdamW, lr=1e-2),
    "adamw-dense": _small(optim.AdamW, lr=1e-2, moments="dense"),
    "adamw-log4": _small(
        optim.AdamW,
        lr=1e-2,
        moments={"exp_avg": "companded(bits=4,group=32)", "exp_avg_sq": "companded(curve=log,bits=4)"},
    ),
    "adamw-split32": _small(optim.AdamW, lr=1e-2, master_weights="split32"),
    "adamw-plain16": _small(optim.AdamW, lr=1e-2, master_weights=None, stochastic_rounding=True),
    "adamw-stochastic": _small(optim.AdamW, lr=1e-2, stochastic_rounding=True, seed=3),
    "adam": _small(optim.Adam, lr=1e-2, weight_decay=0.1),
    "sgd": _small(optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-plain": _small(optim.SGD, lr=1e-2),
    "sgdw": _small(optim.SGDW, lr=1e-2, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "lion": _small(optim.Lion, lr=1e-3, weight_decay=0.1),
    "foam": _small(optim.FOAM, lr=1e-2),
    "foam-companded": _small(optim.FOAM, lr=1e-2, level=1, moments="companded8", variant="official", weight_decay=0.1),
    "slimadam": _small(optim.SlimAdam, lr=1e-2, rules={"a.weight": [0], "b.weight": [1], "conv.weight": [0, 2]}),
    "slimadam-companded": _small(optim.SlimAdam, lr=1e-2, rules={"*.weight": [1]}, moments="companded8"),
    "lorapre": _small(optim.LoRAPre, lr=1e-2, rank=4),
    "lorapre-paper": _small(optim.LoRAPre, lr=1e-2, rank=4, variant="paper"),
    "lorapre-muon": _small(optim.LoRAPre, lr=1e-2, rank=4, base="muon"),
    "muon": _small(optim.Muon, lr=1e-2),
}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return {k: nn.Parameter((_randn(s, generator) * 0.1).to(dtype)) for k, s in SHAPES.items()}


def gradients(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Gradients that depend on the step only: a mean that stays, and noise."""
    fixed, noise = torch.Generator("cpu").manual_seed(99), torch.Generator("cpu").manual_seed(1000 + step)
    return {k: (_randn(s, fixed) * 0.3 + _randn(s, noise)).mul_(1e-2).to(dtype) for k, s in SHAPES.items()}


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def run(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for k, g in gradients(step).items():
            params[k].grad = g.to(params[k].dtype)
        optimizer.step()


def bits(value: Any) -> Any:
    """A nested state as something that == compares bit for bit."""
    if isinstance(value, EncodedTensor):
        return {k: bits(v) for k, v in value.parts.items()}
    if isinstance(value, Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {k: bits(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [bits(v) for v in value]
    return value


def relative(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())
