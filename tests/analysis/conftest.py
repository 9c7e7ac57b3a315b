"""Small models trained for seconds, saved as ordinary checkpoints: a GPT, a conv net, a perceptron."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statecodec_cli.demo.gpt import GPTConfig
from statecodec_cli.demo.train import TrainConfig, Trainer


def _images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten smooth prototypes under noise: learnable, and not at once."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    prototypes = F.interpolate(prototypes, size=12, mode="bilinear")
    labels = torch.randint(10, (count,), generator=generator)
    return prototypes[labels] + 0.8 * torch.randn(count, 1, 12, 12, generator=generator), labels


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, path: Path, every: int) -> list[Path]:
    saved = []
    for step in range(1, steps + 1):
        x, y = _images(32, step)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if step % every == 0:
            saved.append(path.with_name(f"{path.stem}_{step}.pt"))
            torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, saved[-1])
    return saved


def _conv(folder: Path) -> list[Path]:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 24, 3), nn.ReLU(), nn.Conv2d(24, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(3072, 10))
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=1e-3, betas=(0.9, 0.999))
    return _train(net, optimizer, 60, folder / "conv.pt", 20)


def _mlp(folder: Path) -> list[Path]:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 160), nn.GELU(), nn.Linear(160, 96), nn.GELU(), nn.Linear(96, 10))
    optimizer = torch.optim.Adam(net.named_parameters(), lr=2e-3, betas=(0.9, 0.99))
    return _train(net, optimizer, 90, folder / "mlp.pt", 30)


def _gpt(folder: Path) -> list[Path]:
    model = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=32)
    trainer = Trainer(TrainConfig(batch_size=8, warmup=10, model=model))
    saved = []
    for steps in (20, 20, 1):
        trainer.run(steps)
        saved.append(folder / f"gpt_{trainer.step}.pt")
        trainer.save(saved[-1])
    return saved


MODELS: dict[str, Callable[[Path], list[Path]]] = {"gpt": _gpt, "conv": _conv, "mlp": _mlp}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three checkpoints of one run for every model, the latest last."""
    folder = tmp_path_factory.mktemp("trained")
    return {name: train(folder) for name, train in MODELS.items()}


@pytest.fixture(params=MODELS)
def run(request: pytest.FixtureRequest, runs: dict[str, list[Path]]) -> list[Path]:
    """The checkpoints of one model."""
    return runs[request.param]
