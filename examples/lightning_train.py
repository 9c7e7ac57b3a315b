"""Train with Lightning under FSDP2: encoded states, compressed shards, and any number of ranks to go on with.

    torchrun --nproc-per-node 2 examples/lightning_train.py --epochs 10     # Ctrl-C, or kill, at any time
    torchrun --nproc-per-node 3 examples/lightning_train.py --epochs 10     # goes on from the last whole checkpoint

On CPUs with gloo; on GPUs leave `accelerator` and `process_group_backend` out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from statecodec.distributed import INDEX
from statecodec.integrations.lightning import CompressedModelParallelStrategy
from statecodec.optim import AdamW

WIDTH, SAMPLES, BATCH = 64, 96, 24


class Net(LightningModule):
    """A small network in bf16; each of its layers is sharded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, 129), nn.GELU(), nn.Linear(129, WIDTH)]
        self.net = nn.Sequential(*layers).to(torch.bfloat16)
        self.losses: list[float] = []

    def configure_model(self) -> None:
        assert self.device_mesh is not None, "of the strategy"
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Sequence[torch.Tensor], _: int) -> torch.Tensor:
        loss = (self.net(batch[0]) - batch[0].flip(-1)).float().square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return AdamW(self.named_parameters(), lr=1e-2)


def data(rank: int, ranks: int) -> DataLoader:
    """A rank's part. The samples of a step are the same on any number of ranks, so that runs can be compared."""
    x = TensorDataset(torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16))
    return DataLoader(x, batch_size=BATCH // ranks, sampler=DistributedSampler(x, ranks, rank, shuffle=False))


def last(folder: Path) -> Path | None:
    """The last whole checkpoint of a folder."""
    whole = sorted(folder.glob(f"*.ckpt/{INDEX}"), key=lambda index: index.stat().st_mtime_ns)
    return whole[-1].parent if whole else None


def train(folder: Path, epochs: int) -> list[float]:
    """Train up to so many epochs in all, from the last whole checkpoint of the folder if there is one.

    Returns:
        This rank's losses of the steps that were made.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    strategy = CompressedModelParallelStrategy(
        data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend="gloo"
    )
    saving = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[saving],
        default_root_dir=folder,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    net = Net()
    trainer.fit(net, data(rank, ranks), ckpt_path=last(folder), weights_only=False)
    return net.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("lightning-checkpoints"))
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    losses = train(args.folder, args.epochs)
    if os.environ["RANK"] == "0":
        made = f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else "nothing left to do"
        print(f"{made}; the checkpoints are in {args.folder}")


if __name__ == "__main__":
    main()
