"""Saves and loads of one process, which needs no process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from statecodec import optim
from statecodec.distributed import StatecodecReader, StatecodecWriter


def state(seed: int = 0, optimizer: str = "torch") -> dict[str, Any]:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Linear(96, 40))
    made = {"torch": torch.optim.AdamW, "statecodec": optim.AdamW}[optimizer](net.parameters(), lr=1e-3)
    for _ in range(3):
        made.zero_grad()
        net(torch.randn(8, 96)).square().mean().backward()
        made.step()
    return {"model": net.state_dict(), "optim": get_optimizer_state_dict(net, made), "epoch": 7}


def save(value: dict[str, Any], folder: Any, **options: Any) -> None:
    dcp.save(value, storage_writer=StatecodecWriter(folder, **options), no_dist=True)


def load(folder: Any, like: dict[str, Any], **options: Any) -> dict[str, Any]:
    dcp.load(like, storage_reader=StatecodecReader(folder, **options), no_dist=True)
    return like


def rank_files(folder: Path) -> list[Path]:
    return list(folder.glob("rank-*.sc.safetensors"))
