"""Optimizer states in the project's own files: saved as they are, resumed from, and kept by `compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import statecodec
from statecodec import optim
from statecodec.codecs.plain import is_plain
from tests.optim.helpers import EVERY, bits, parameters, relative, run

NAMES = ["adamw", "adamw-stochastic", "sgdw", "lion", "foam-companded", "slimadam-companded", "lorapre", "muon"]


def continued(name: str, checkpoint: dict[str, Any], steps: range) -> tuple[Any, Any]:
    params = {k: nn.Parameter(v.clone()) for k, v in checkpoint["model"].items()}
    optimizer = EVERY[name](params.items())
    optimizer.load_state_dict(checkpoint["optimizer"])
    run(optimizer, params, steps)
    return bits(params), bits(optimizer.state_dict())


def trained(name: str, steps: int = 3) -> tuple[Any, Any]:
    params = parameters(torch.bfloat16)
    optimizer = EVERY[name](params.items())
    run(optimizer, params, range(steps))
    return optimizer, params


@pytest.mark.parametrize("pack", ["none", "zstd"])
@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_resume_bit_exactly(name: str, pack: str, tmp_path: Path) -> None:
    optimizer, params = trained(name)
    path = tmp_path / "ckpt.sc.safetensors"
    state = {"model": {k: p.detach() for k, p in params.items()}, "optimizer": optimizer.state_dict()}
    statecodec.save(state, path, pack=pack)
    resumed = continued(name, statecodec.load(path), range(3, 6))
    run(optimizer, params, range(3, 6))
    assert resumed == (bits(params), bits(optimizer.state_dict()))


@pytest.mark.parametrize("name", NAMES)
def test_compress_keeps_encoded_states_as_they_are(name: str, tmp_path: Path) -> None:
    optimizer, params = trained(name)
    checkpoint = {"model": {k: p.detach() for k, p in params.items()}, "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    statecodec.compress(tmp_path / "ckpt.pt")
    loaded = statecodec.load(tmp_path / "ckpt.sc.safetensors")
    saved, found = checkpoint["optimizer"]["state"], loaded["optimizer"]["state"]
    encoded = [(i, k) for i, state in saved.items() for k, v in state.items() if is_plain(v)]
    assert encoded
    for i, k in encoded:
        assert bits(found[i][k]) == bits(saved[i][k]), (i, k)
    statecodec.restore(tmp_path / "ckpt.sc.safetensors", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert bits(again["optimizer"]) == bits(checkpoint["optimizer"])


def test_resuming_from_a_compressed_torch_checkpoint(tmp_path: Path) -> None:
    """torch.optim.AdamW -> compress -> load -> our AdamW, against the uncompressed way."""
    params = parameters()
    theirs = torch.optim.AdamW(params.values(), lr=1e-3)
    run(theirs, params, range(10))
    torch.save(
        {"model": {k: p.detach() for k, p in params.items()}, "optimizer": theirs.state_dict()}, tmp_path / "c.pt"
    )
    statecodec.compress(tmp_path / "c.pt")
    loaded = statecodec.load(tmp_path / "c.sc.safetensors")
    ours_params = {k: nn.Parameter(v.clone()) for k, v in loaded["model"].items()}
    ours = optim.AdamW(ours_params.values(), dense_below=0)
    ours.load_state_dict(loaded["optimizer"])
    start = {k: p.detach().clone() for k, p in ours_params.items()}
    before = {k: p.detach().clone() for k, p in params.items()}
    assert ours.param_groups[0]["lr"] == 1e-3
    run(theirs, params, range(10, 20))
    run(ours, ours_params, range(10, 20))
    for k in params:
        assert relative(ours_params[k] - start[k], params[k] - before[k]) < 0.05, k
