"""Lightning writes compressed checkpoints and resumes from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from statecodec.checkpoint.sniff import is_compressed
from statecodec.errors import PolicyError, UsageError

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from statecodec.integrations.lightning import CompressedCheckpointIO, CompressedModelParallelStrategy

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(LightningModule):
    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
        self.losses: dict[int, float] = {}

    def training_step(self, batch: Any, index: int) -> Any:
        loss = (self.net(batch[0]) - batch[0].flip(-1)).square().mean()
        self.losses[self.global_step] = float(loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(folder: Path, steps: int, plugin: Any, resume: Path | None = None) -> dict[int, float]:
    seed_everything(0, verbose=False)
    # Four batches an epoch: in the middle of one Lightning would begin its data again, however it was saved.
    data = torch.utils.data.TensorDataset(torch.randn(16, 8))
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    net = Net(argparse.Namespace(width=64))
    run = Trainer(
        max_steps=steps, plugins=[plugin], callbacks=[keep], logger=False, accelerator="cpu", devices=1,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    run.fit(net, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=resume, weights_only=False)
    return net.losses


@pytest.mark.parametrize(("preset", "most"), [("lossless", 0.0), ("resume", 1e-5)])
def test_an_interrupted_run_goes_on(preset: str, most: float, tmp_path: Path) -> None:
    plugin = CompressedCheckpointIO(preset)
    wanted = fit(tmp_path / "a", 12, AsyncCheckpointIO(plugin) if most else plugin)
    written = tmp_path / "a" / "step=4.ckpt"
    assert is_compressed(written)
    found = fit(tmp_path / "b", 12, CompressedCheckpointIO(preset), written)
    assert sorted(found) == list(range(4, 12))
    assert max(abs(found[step] - wanted[step]) for step in found) <= most
    assert not [p for p in (tmp_path / "a").iterdir() if p.name.startswith(".")]


def test_plain_checkpoints_are_read_and_both_are_removed(tmp_path: Path) -> None:
    plugin = CompressedCheckpointIO("lossless")
    plain, packed = tmp_path / "plain.ckpt", tmp_path / "new" / "packed.ckpt"
    torch.save({"a": torch.ones(3)}, plain)
    plugin.save_checkpoint({"a": torch.ones(3)}, packed)
    for path in (plain, packed):
        assert torch.equal(plugin.load_checkpoint(path, map_location="cpu")["a"], torch.ones(3))
        plugin.remove_checkpoint(path)
        assert not path.exists()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="huge"):
        CompressedCheckpointIO("huge")
    plugin = CompressedCheckpointIO()
    with pytest.raises(UsageError, match="local"):
        plugin.save_checkpoint({}, "s3://bucket/x.ckpt")
    with pytest.raises(UsageError, match="storage_options"):
        plugin.save_checkpoint({}, tmp_path / "x.ckpt", storage_options={})
    with pytest.raises(PolicyError, match="huge"):
        CompressedModelParallelStrategy("huge")
    with pytest.raises(UsageError, match="one file"):
        CompressedModelParallelStrategy(options={"max_shard_size": "1GB"})
    with pytest.raises(UsageError, match="save_distributed_checkpoint"):
        CompressedModelParallelStrategy(save_distributed_checkpoint=False)
    with pytest.raises(UsageError, match="storage_options"):
        CompressedModelParallelStrategy().save_checkpoint({}, tmp_path, storage_options={})
    with pytest.raises(UsageError, match="weights_only"):
        CompressedModelParallelStrategy().load_checkpoint(tmp_path, weights_only=True)
