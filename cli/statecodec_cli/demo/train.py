"""Training: deterministic by seed, resumable, and saved the way nanoGPT saves it.

A checkpoint is `torch.save` of {model, optimizer, model_args, iter_num, best_val_loss, config}. The learning rate is a
function of the step and the data one of (seed, step), so nothing else is needed to go on as if nothing had happened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from statecodec_cli.demo.data import Corpus, standard_library
from statecodec_cli.demo.gpt import GPT, GPTConfig

Groups = Iterable[dict[str, Any]]
OptimizerFactory = Callable[[Groups, "TrainConfig"], Optimizer]
OnStep = Callable[[int, float], None]  # step (from 1), loss


@dataclass(frozen=True)
class TrainConfig:
    """One run. Steps count from 0; `decay_steps` is where the cosine schedule reaches a tenth of `lr`."""

    batch_size: int = 12
    lr: float = 1e-3
    warmup: int = 40
    decay_steps: int = 2000
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    eval_batches: int = 8
    seed: int = 0
    device: str = "cpu"
    model: GPTConfig = field(default_factory=GPTConfig)

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.decay_steps - self.warmup))
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def adamw(groups: Groups, config: TrainConfig) -> Optimizer:
    """torch's AdamW with the run's settings."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


class Trainer:
    """A model, its optimizer, and how far they have come."""

    def __init__(
        self, config: TrainConfig, *, corpus: Corpus | None = None, optimizer: OptimizerFactory = adamw
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.corpus = corpus or standard_library()
        self.model = GPT(config.model).to(config.device)
        self.optimizer = optimizer(self.model.parameter_groups(config.weight_decay), config)
        self.step = 0
        self.losses: list[float] = []
        self.best_val_loss = math.inf

    @property
    def num_params(self) -> int:
        """Parameters, the tied matrix counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def run(self, steps: int, on_step: OnStep | None = None) -> list[float]:
        """Take so many steps and return their losses (nats per byte), which are also appended to `losses`."""
        self.model.train()
        before = len(self.losses)
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr_at(self.step)
            loss = self._loss(self.step, "train")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
            self.optimizer.step()
            self.step += 1
            self.losses.append(loss.item())
            if on_step:
                on_step(self.step, self.losses[-1])
        return self.losses[before:]

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over a fixed set of validation batches."""
        self.model.eval()
        loss = sum(self._loss(i, "val").item() for i in range(self.config.eval_batches)) / self.config.eval_batches
        self.model.train()
        self.best_val_loss = min(self.best_val_loss, loss)
        return loss

    def save(self, path: Path) -> None:
        """Write an ordinary nanoGPT-style checkpoint."""
        settings = {f.name: getattr(self.config, f.name) for f in fields(self.config) if f.name != "model"}
        checkpoint = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model_args": asdict(self.config.model),
            "iter_num": self.step,
            "best_val_loss": self.best_val_loss,
            "config": settings | {"losses": list(self.losses)},
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            torch.save(checkpoint, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def resume(
        cls,
        path: Path,
        *,
        corpus: Corpus | None = None,
        optimizer: OptimizerFactory = adamw,
        device: str | None = None,
    ) -> Trainer:
        """Go on from a checkpoint that `save` wrote, as any training script would: with torch.load."""
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        settings = dict(checkpoint["config"])
        losses = settings.pop("losses")
        config = TrainConfig(**settings, model=GPTConfig(**checkpoint["model_args"]))
        trainer = cls(config if device is None else replace(config, device=device), corpus=corpus, optimizer=optimizer)
        trainer.model.load_state_dict(checkpoint["model"])
        trainer.optimizer.load_state_dict(checkpoint["optimizer"])
        trainer.step, trainer.losses = checkpoint["iter_num"], list(losses)
        trainer.best_val_loss = checkpoint["best_val_loss"]
        return trainer

    def _loss(self, index: int, split: str) -> torch.Tensor:
        config = self.config
        tokens, targets = self.corpus.batch(
            index, seed=config.seed, batch_size=config.batch_size, block_size=config.model.block_size, split=split
        )
        loss: torch.Tensor = self.model(tokens.to(config.device), targets.to(config.device))
        return loss
