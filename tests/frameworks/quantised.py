"""Checkpoints of optimizers that keep 8- and 4-bit states, and what their packages say that these states are.

bitsandbytes and torchao write theirs here, after real steps on the CPU. FlashOptim quantises on a GPU only: its file is
made in the structure that its source writes, and the numbers are worked out here.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchao = pytest.importorskip("torchao.optim")
    bitsandbytes = pytest.importorskip("bitsandbytes")

States = dict[int, dict[str, torch.Tensor]]


@dataclass
class Quantised:
    """A checkpoint, the bits of its quantised states, and all moments as fp32, by parameter and key."""

    path: Path
    package: str
    bits: int
    states: States = field(default_factory=dict)


def model() -> torch.nn.Module:
    """Weights large enough to be quantised, and a size that is no multiple of a block."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 65))


def stepped(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pages need a GPU
        for _ in range(2):
            net(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


def write_bitsandbytes(folder: Path, name: str) -> Quantised:
    """`name` is an optimizer of the package; a leading "old " puts the states where older versions had them."""
    net = model()
    kind = name.removeprefix("old ")
    optimizer = getattr(bitsandbytes.optim, kind)(net.parameters(), lr=1e-3)
    saved = stepped(net, optimizer)
    states = {i: _of_bitsandbytes(optimizer.state[p]) for i, p in enumerate(net.parameters())}
    if name != kind:
        for state in saved["optimizer"]["state"].values():
            state.update(state.pop("__bnb_optimizer_quant_state__"))
    path = folder / f"{name}.pt"
    torch.save(saved, path)
    return Quantised(path, "bitsandbytes", 8, states)


def _of_bitsandbytes(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {}
    for number, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
        value = state.get(f"state{number}")
        if value is not None and value.dtype is torch.uint8:
            absmax, qmap = state[f"absmax{number}"], state[f"qmap{number}"]
            value = bitsandbytes.functional.dequantize_blockwise(value, absmax=absmax, code=qmap, blocksize=256)
        if value is not None:
            found[key] = value.float()
    return found


def write_torchao(folder: Path, name: str) -> Quantised:
    with mock.patch.object(torch, "compile", lambda function, **_: function):  # its step needs no compiler to be right
        net = model()
        optimizer = getattr(torchao, name)(net.parameters(), lr=1e-3)
        saved = stepped(net, optimizer)
    states = {
        i: {k: (v.dequantize() if hasattr(v, "dequantize") and hasattr(v, "codes") else v.clone())
            for k, v in optimizer.state[p].items() if k != "step"}
        for i, p in enumerate(net.parameters())
    }  # fmt: skip
    path = folder / f"{name}.pt"
    torch.save(saved, path)
    return Quantised(path, "torchao", 4 if "4bit" in name else 8, states)


def write_flashoptim(folder: Path, scales: torch.dtype) -> Quantised:
    """In FlashOptim's structure; with bf16 parameters it keeps the bits of the fp16 scales under the dtype bf16."""
    net = model()
    generator = np.random.default_rng(0)
    found: dict[int, dict[str, Any]] = {}
    states: States = {}
    for i, p in enumerate(net.parameters()):
        numbers = p.numel()
        groups = math.ceil(numbers / 32)
        m = generator.integers(-127, 128, numbers, dtype=np.int8)
        v = generator.integers(0, 256, numbers, dtype=np.uint8)
        m[::32], v[::32] = -127, 255  # a group is divided by its largest number
        sizes = {k: generator.uniform(1e-4, 1e-2, groups).astype(np.float16) for k in ("exp_avg", "exp_avg_sq")}
        spread = {k: np.repeat(s.astype(np.float32), 32)[:numbers] for k, s in sizes.items()}
        signed = m.astype(np.float32) / np.float32(127)
        first = signed / (np.float32(2) - np.abs(signed)) * spread["exp_avg"]
        second = (v.astype(np.float32) / np.float32(255) * spread["exp_avg_sq"]) ** 2
        states[i] = {
            "exp_avg": torch.from_numpy(first).view(p.shape),
            "exp_avg_sq": torch.from_numpy(second).view(p.shape),
        }
        found[i] = {
            "step": torch.tensor(2), "exp_avg::quantized": torch.from_numpy(m).view(p.shape),
            "exp_avg::scales": torch.from_numpy(sizes["exp_avg"]).view(scales),
            "exp_avg_sq::quantized": torch.from_numpy(v).view(p.shape),
            "exp_avg_sq::scales": torch.from_numpy(sizes["exp_avg_sq"]).view(scales),
        }  # fmt: skip
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": list(found),
             "quantize": True, "master_bytewidth": 4, "initial_lr": 1e-3}  # fmt: skip
    path = folder / f"flash {scales}.pt"
    torch.save({"model": net.state_dict(), "optimizer": {"state": found, "param_groups": [group]}}, path)
    return Quantised(path, "flashoptim", 8, states)


WRITERS = {
    "bitsandbytes": lambda folder: write_bitsandbytes(folder, "AdamW8bit"),
    "bitsandbytes, paged": lambda folder: write_bitsandbytes(folder, "PagedAdamW8bit"),
    "bitsandbytes, older": lambda folder: write_bitsandbytes(folder, "old AdamW8bit"),
    "torchao 8 bit": lambda folder: write_torchao(folder, "AdamW8bit"),
    "torchao 4 bit": lambda folder: write_torchao(folder, "AdamW4bit"),
    "torchao fp8": lambda folder: write_torchao(folder, "AdamWFp8"),
    "flashoptim (structure)": lambda folder: write_flashoptim(folder, torch.float16),
    "flashoptim, bf16 (structure)": lambda folder: write_flashoptim(folder, torch.bfloat16),
}
