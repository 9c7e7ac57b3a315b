"""Helpers that the layout tests share: real checkpoints, and the oracle that compares views with torch.load."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from statecodec.layouts import Crc32, Moments, Source, View, list_memory, locate, tree
from statecodec.layouts.locate import locate_listing


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


@dataclass(frozen=True)
class FoundRegion:
    """A region, with what is known of the tensor in it."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    lossless: bool
    name: str
    role: str
    param: str | None


@dataclass(frozen=True)
class FoundFile:
    """One located file whose tensors have one piece each: what this package's tests look at."""

    path: str
    layout: str
    note: str | None
    same_as: str | None
    regions: tuple[FoundRegion, ...]
    views: tuple[View, ...]
    crcs: tuple[Crc32, ...]
    moments: tuple[Moments, ...]


def found_files(source: Source) -> list[FoundFile]:
    """The files of a located checkpoint. Names of regions and moments are without the file's own path."""
    by_place = {(p.file, p.region): (t, p.part) for t in source.tensors for p in t.pieces}
    files = []
    for file in source.files:
        prefix = f"{file.path}:" if source.is_directory else ""
        regions = []
        for number, r in enumerate(file.regions):
            tensor, part = by_place.pop((file.path, number))
            assert part is None
            name = tensor.name.removeprefix(prefix)
            regions.append(
                FoundRegion(r.offset, r.nbytes, r.dtype.torch, r.shape, r.lossless, name, tensor.role, tensor.param)
            )
        own = tuple(
            replace(m, exp_avg=m.exp_avg.removeprefix(prefix), exp_avg_sq=m.exp_avg_sq.removeprefix(prefix),
                    weight=m.weight and m.weight.removeprefix(prefix))
            for m in source.moments
            if m.exp_avg.startswith(prefix)
        )  # fmt: skip
        files.append(
            FoundFile(file.path, file.layout, file.note, file.same_as, tuple(regions), file.views, file.crcs, own)
        )
    assert not by_place
    return files


def found_file(path: Path) -> FoundFile:
    """The only file of a located checkpoint."""
    (file,) = found_files(locate(path))
    return file


def locate_bytes(data: bytes) -> Source:
    """Locate a checkpoint in memory."""
    return locate_listing(list_memory({"x": data}), Path("x"))


def tree_of_bytes(data: bytes) -> Any:
    """The content of a checkpoint in memory."""
    return tree(list_memory({"x": data}))


def read_view(path: Path, file: FoundFile, name: str) -> torch.Tensor:
    """The tensor that a view describes, straight from the file's bytes."""
    view = next(v for v in file.views if v.name == name)
    region = file.regions[view.region]
    data = path.read_bytes()[region.offset : region.offset + region.nbytes]
    storage = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return torch.empty(0, dtype=view.dtype.torch).set_(storage.untyped_storage(), view.offset, view.shape, view.stride)


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
