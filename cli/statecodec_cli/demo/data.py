"""The data: the Python standard library's sources as bytes, found on every machine that runs Python.

A batch is a function of (seed, step) alone, so two runs that resume at the same step see the same data in the same
order without saving any generator state.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "__pycache__"}
_HELD_OUT = 10  # every tenth file is for validation


@dataclass(frozen=True)
class Corpus:
    """Training and validation text, uint8, one dimension each."""

    train: Tensor
    val: Tensor

    def batch(
        self, step: int, *, seed: int, batch_size: int, block_size: int, split: str = "train"
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step: int64, (batch_size, block_size) each; targets are the inputs one byte on."""
        text = self.train if split == "train" else self.val
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + (split == "val"))
        starts = torch.randint(len(text) - block_size - 1, (batch_size,), generator=generator)
        windows = torch.stack([text[s : s + block_size + 1] for s in starts.tolist()]).long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def standard_library(limit: int = 8 << 20) -> Corpus:
    """The first `limit` bytes of the standard library's .py files, whole files, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[bytes]] = {"train": [], "val": []}
    read = 0
    paths = [p for p in sorted(root.rglob("*.py")) if not _SKIPPED.intersection(p.relative_to(root).parts)]
    for number, path in enumerate(paths):
        content = path.read_bytes()
        parts["val" if number % _HELD_OUT == 0 else "train"].append(content)
        read += len(content)
        if read >= limit:
            break
    train, val = (torch.frombuffer(bytearray(b"\n".join(parts[name])), dtype=torch.uint8) for name in ("train", "val"))
    return Corpus(train, val)
