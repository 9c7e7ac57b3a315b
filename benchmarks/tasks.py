"""What `resume.py` and `chain.py` train: small models under every optimizer, each a function of its seeds alone.

A batch is a function of (data order, step), so a run that resumes at a step sees the data that it would have seen. The
learning rate is one of the step. Held-out data are the same for every run of a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from statecodec_cli.demo.data import Corpus, standard_library
from statecodec_cli.demo.gpt import GPT, GPTConfig

Batch: TypeAlias = tuple[Tensor, Tensor]

WARMUP, DECAY = 40, 400  # steps; the cosine ends at a tenth
BLOCK = 64
TRAINED = 1000  # the data order before anything is saved


@dataclass(frozen=True)
class Task:
    """A model, its optimizers and its data. `batch` takes a data order and a step; an order of None is held out."""

    name: str
    net: Callable[[], nn.Module]
    optimizers: Callable[[nn.Module], list[Optimizer]]
    batch: Callable[[int | None, int], Batch]
    about: str
    seed: int = 0
    """Of the weights that training begins with."""


class TaskRun:
    """A task's model and optimizers, and how far they have come."""

    def __init__(self, task: Task) -> None:
        torch.manual_seed(task.seed)
        self.task, self.model, self.step = task, task.net(), 0
        self.optimizers = task.optimizers(self.model)
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def train(self, steps: int, order: int) -> list[float]:
        """Take so many steps; their losses."""
        self.model.train()
        losses = []
        for _ in range(steps):
            self._schedule()
            loss = self._loss(order, self.step)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on the held-out data."""
        self.model.eval()
        return self._loss(None, 0).item()

    def weights(self) -> Tensor:
        """All weights as one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def save(self, path: Path) -> None:
        """An ordinary checkpoint."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        saved = {"model": self.model.state_dict(), "step": self.step}
        torch.save(saved | ({"optimizer": states[0]} if len(states) == 1 else {"optimizers": states}), path)

    @classmethod
    def load(cls, task: Task, path: Path) -> TaskRun:
        """Go on from a checkpoint, as any training script would: with torch.load."""
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        run = cls(task)
        run.model.load_state_dict(saved["model"])
        states = saved["optimizers"] if "optimizers" in saved else [saved["optimizer"]]
        for optimizer, state in zip(run.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        run.step = saved["step"]
        return run

    def _schedule(self) -> None:
        """Linear warm-up, then a cosine down to a tenth."""
        done = min(1.0, max(0, self.step - WARMUP) / (DECAY - WARMUP))
        factor = min(1.0, (self.step + 1) / WARMUP) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def _loss(self, order: int | None, step: int) -> Tensor:
        inputs, targets = self.task.batch(order, step)
        logits = self.model(inputs)
        return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


class Logits(GPT):
    """The demo's GPT without its loss."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens, int64 (batch, time), to logits (batch, time, vocabulary)."""
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x)
        logits: Tensor = self.lm_head(self.transformer["ln_f"](x))
        return logits


@cache
def corpus() -> Corpus:
    """The standard library's sources."""
    return standard_library()


def text(batch_size: int, order: int | None, step: int) -> Batch:
    """Windows of the corpus; 64 of them, always the same, are held out."""
    if order is None:
        return corpus().batch(0, seed=0, batch_size=64, block_size=BLOCK, split="val")
    return corpus().batch(step, seed=order, batch_size=batch_size, block_size=BLOCK)


def stripes(order: int | None, step: int) -> Batch:
    """Images (3 channels, 24 x 24) of stripes in ten directions under strong noise, and the directions."""
    generator = torch.Generator().manual_seed(7 if order is None else 1_000_003 * (order + 1) + step)
    count = 1024 if order is None else 32
    label = torch.randint(10, (count,), generator=generator)
    angle, phase = label * math.pi / 10, 2 * math.pi * torch.rand(count, generator=generator)
    x, y = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    waves = torch.sin(0.8 * (angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y) + phase[:, None, None])
    return waves[:, None] + 3.0 * torch.randn(count, 3, 24, 24, generator=generator), label


def gpt(layers: int, width: int) -> nn.Module:
    """A GPT on bytes."""
    return Logits(GPTConfig(block_size=BLOCK, n_layer=layers, n_head=6, n_embd=width))


def half_precision(layers: int, width: int) -> nn.Module:
    """The same, all in bf16: so are the moments, and there are no masters."""
    return gpt(layers, width).bfloat16()


def conv() -> nn.Module:
    """A convolutional net with batch norm, 0.4 M parameters."""
    layers: list[nn.Module] = []
    for channels, out, stride in ((3, 64, 1), (64, 128, 2), (128, 256, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def adamw(lr: float, beta2: float, net: nn.Module) -> list[Optimizer]:
    """torch's AdamW."""
    return [torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=0.1)]


def sgd(net: nn.Module) -> list[Optimizer]:
    """torch's SGD with momentum."""
    return [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)]


def lion(net: nn.Module) -> list[Optimizer]:
    """Lion (arXiv 2302.06675)."""
    return [ReferenceLion(net.parameters(), lr=1e-4, weight_decay=0.1)]


class ReferenceLion(Optimizer):
    """Lion as published: a step of lr in the sign of an interpolated momentum, decoupled decay."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(m.lerp(p.grad, 1 - beta1).sign_(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - beta2)


def muon(net: nn.Module) -> list[Optimizer]:
    """torch's Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    blocks = [p for n, p in net.named_parameters() if p.ndim == 2 and ".h." in n]
    others = [p for n, p in net.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    return [torch.optim.Muon(blocks, lr=0.02, weight_decay=0.1), torch.optim.AdamW(others, lr=6e-4, betas=(0.9, 0.95))]


GPTS = tuple(
    Task(
        f"gpt-adamw-{beta2}",
        partial(gpt, 6, 384),
        partial(adamw, 6e-4, beta2),
        partial(text, 2),
        f"GPT, AdamW, beta2 {beta2}",
    )
    for beta2 in (0.95, 0.999)
)
HALF_PRECISION = Task(
    "gpt-bf16",
    partial(half_precision, 12, 384),
    partial(adamw, 6e-4, 0.95),
    partial(text, 8),
    "GPT in bf16, AdamW, beta2 0.95",
)
"""For sizes and times; no resume is measured from it."""
TASKS = (
    *GPTS,
    Task("conv-sgd", conv, sgd, stripes, "conv net, SGD with momentum"),
    Task("gpt-muon", partial(gpt, 4, 192), muon, partial(text, 4), "GPT, Muon and AdamW"),
    Task("gpt-lion", partial(gpt, 4, 192), lion, partial(text, 4), "GPT, Lion"),
    Task("conv-adamw", conv, partial(adamw, 1e-3, 0.999), stripes, "conv net, AdamW"),
)
SEEDED = tuple(
    replace(task, name=f"{task.name}-seed-{seed}", about=f"{task.about}, other weights {seed}", seed=seed)
    for task in GPTS
    for seed in (1, 2)
)
"""The same from other weights and in other data orders, for presets alone."""
