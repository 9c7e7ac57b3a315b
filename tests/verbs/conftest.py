"""Real checkpoints, written by torch and safetensors, small enough to run everything on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def train(steps: int = 12, width: int = 96, seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    """A small model with a tied head after a few AdamW steps, in two parameter groups."""
    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {
            "wte": nn.Embedding(130, width),
            "fc": nn.Linear(width, 4 * width),
            "proj": nn.Linear(4 * width, width),
            "ln": nn.LayerNorm(width),
            "head": nn.Linear(width, 130, bias=False),
        }
    )
    model["head"].weight = model["wte"].weight
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(steps):
        tokens = torch.randint(0, 120, (64,))
        x = model["wte"](tokens)
        x = model["ln"](x + model["proj"](torch.relu(model["fc"](x))))
        loss = nn.functional.cross_entropy(model["head"](x), (tokens * 7 + 1) % 120)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture(scope="session")
def content() -> dict[str, Any]:
    """What a nanoGPT-style checkpoint holds, odd objects included."""
    model, optimizer = train()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iter_num": 12,
        "best_val_loss": torch.tensor(3.5),
        "config": {"name": "run", "path": Path("data/x"), "betas": (0.9, 0.95), "rng": torch.get_rng_state()},
    }


@pytest.fixture
def checkpoint(tmp_path: Path, content: dict[str, Any]) -> Path:
    """ckpt.pt."""
    path = tmp_path / "ckpt.pt"
    torch.save(content, path)
    return path
