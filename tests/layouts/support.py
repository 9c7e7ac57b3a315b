"""Helpers that the layout tests share: real checkpoints, and the oracle that compares views with torch.load."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from statecodec.layouts import SourceFile


class Net(torch.nn.Module):
    """Tied head, 1-D and 4-D weights, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(16, 8)
        self.fc = torch.nn.Linear(8, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.proj = torch.nn.Linear(8, 8)
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.bn = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(8, 16, bias=False)
        self.head.weight = self.wte.weight


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()


def split_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Decay and no-decay groups, as nanoGPT and the Hugging Face Trainer make them."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def read_view(path: Path, file: SourceFile, name: str) -> torch.Tensor:
    """The tensor that a view describes, straight from the file's bytes."""
    view = next(v for v in file.views if v.name == name)
    region = file.regions[view.region]
    data = path.read_bytes()[region.offset : region.offset + region.nbytes]
    storage = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return torch.empty(0, dtype=view.dtype).set_(storage.untyped_storage(), view.offset, view.shape, view.stride)


def check_file(file: SourceFile) -> None:
    """What every SourceFile promises about its own fields."""
    end = 0
    for region in file.regions:
        assert region.offset >= end
        end = region.offset + region.nbytes
        assert torch.Size(region.shape).numel() * region.dtype.itemsize == region.nbytes
    assert end <= file.nbytes
    assert len({r.name for r in file.regions}) == len(file.regions)
    assert len({v.name for v in file.views}) == len(file.views)
    names = {r.name for r in file.regions}
    for moments in file.moments:
        assert {moments.exp_avg, moments.exp_avg_sq} <= names
        assert moments.weight is None or moments.weight in names
    for view in file.views:
        region = file.regions[view.region]
        if torch.Size(view.shape).numel():
            last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
            assert view.offset >= 0
            assert (last + 1) * view.dtype.itemsize <= region.nbytes


def pickle_of(obj: Any, protocol: int = 2) -> bytes:
    """The data.pkl that torch.save writes for an object."""
    buffer = io.BytesIO()
    torch.save(obj, buffer, pickle_protocol=protocol)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


def zip_of(pickle: bytes, storages: dict[str, bytes], **extra: bytes) -> bytes:
    """A torch-like archive around a pickle of our own making."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", b"3\n")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in extra.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()
