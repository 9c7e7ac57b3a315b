"""The contract suite for every registered layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from statecodec.layouts import dcp, megatron, safetensors_file, torch_zip, zero
from statecodec.layouts.registry import LAYOUTS
from tests.contracts.layout import LayoutContract
from tests.layouts.megatron_files import distributed_optimizer
from tests.layouts.support import Net, split_groups, train
from tests.layouts.written_zero import small


class TestTorchZip(LayoutContract):
    layout = torch_zip

    def write(self, folder: Path) -> Any:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(split_groups(model))
        train(model, optimizer)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2, "odd": (None, [1.5])}
        torch.save(state, folder / "ckpt.pt")
        return torch.load(folder / "ckpt.pt")


class TestSafetensors(LayoutContract):
    layout = safetensors_file

    def write(self, folder: Path) -> Any:
        tensors = {"b": torch.randn(8, 4), "a": torch.arange(5), "none": torch.zeros(0, 3), "one": torch.tensor(1.5)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with safe_open(folder / "model.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}


class TestDcp(LayoutContract):
    layout = dcp
    sample = 12

    @pytest.fixture(autouse=True)
    def folder(self, dcp_alone: Path) -> None:
        self.source = dcp_alone / "nested"

    def write(self, folder: Path) -> Any:
        shutil.copytree(self.source, folder, dirs_exist_ok=True)
        return torch.load(self.source.with_suffix(".pt"), weights_only=False)


class TestZero(LayoutContract):
    layout = zero
    sample = 12

    def write(self, folder: Path) -> Any:
        for path, value in small().items():
            torch.save(value, folder / Path(path).name)
        return {path.name: torch.load(path) for path in sorted(folder.iterdir())}


class TestMegatron(LayoutContract):
    layout = megatron
    sample = 12

    def write(self, folder: Path) -> Any:
        rank = distributed_optimizer(folder, {"a": (4, 8), "b": (8,)})
        loaded = {path.name: torch.load(path) for path in sorted(rank.iterdir())}
        return {"iter_0000010/mp_rank_00": loaded, "latest_checkpointed_iteration.txt": b"10"}


def test_every_registered_layout_has_a_contract() -> None:
    covered = {kind.layout.name for kind in (TestTorchZip, TestSafetensors, TestDcp, TestZero, TestMegatron)}
    assert covered == {layout.name for layout in LAYOUTS}
