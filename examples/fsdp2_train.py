"""Train under FSDP2 with encoded states, saving as you go; kill it, and go on with any number of ranks.

    torchrun --nproc-per-node 2 examples/fsdp2_train.py --steps 100     # Ctrl-C, or kill, at any time
    torchrun --nproc-per-node 3 examples/fsdp2_train.py --steps 100     # goes on from the last checkpoint

A checkpoint becomes visible when it is whole: a save that is killed leaves the one before it. The states that the
optimizer holds are saved as they are, and no rank of another world encodes them again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from statecodec.distributed import INDEX, StatecodecReader, StatecodecWriter
from statecodec.optim import AdamW

WIDTH, BATCH = 96, 32


def network() -> nn.Module:
    """A small network in bf16, each of its layers sharded."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, 301), nn.GELU(), nn.Linear(301, WIDTH), nn.GELU(), nn.Linear(WIDTH, 7)]
    model = nn.Sequential(*layers).to(torch.bfloat16)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples of a step: the same on every rank, so that runs on any number of ranks can be compared."""
    generator = torch.Generator().manual_seed(step % 8)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    return x.to(torch.bfloat16), x[:, :7].abs().argmax(1)


def train(
    folder: Path, steps: int, every: int = 10, after_step: Callable[[int], None] = lambda step: None
) -> list[float]:
    """Train up to `steps` steps in all, from the checkpoint in the folder if there is one.

    Args:
        folder: of the checkpoint; all ranks see it.
        steps: how many in all.
        every: how many steps lie between two saves.
        after_step: called after each step, with its number.

    Returns:
        The losses of the steps that were made.
    """
    model = network()
    optimizer = AdamW(model.named_parameters(), lr=3e-3)
    first = 0
    if (folder / INDEX).exists():
        weights, states = get_state_dict(model, optimizer)
        saved: dict[str, Any] = {"model": weights, "optim": states, "step": torch.tensor(0)}
        dcp.load(saved, storage_reader=StatecodecReader(folder))
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optim"])
        first = int(saved["step"])
    losses = []
    for step in range(first, steps):
        x, target = batch(step)
        loss = nn.functional.cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % every == 0 or step + 1 == steps:
            weights, states = get_state_dict(model, optimizer)
            saved = {"model": weights, "optim": states, "step": torch.tensor(step + 1)}
            dcp.save(saved, storage_writer=StatecodecWriter(folder, preset="lossless"))
        after_step(step)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("fsdp2-checkpoint"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="save after every so many steps (default: 10)")
    args = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    losses = train(args.folder, args.steps, args.every)
    if dist.get_rank() == 0:
        made = f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else "nothing left to do"
        print(f"{made}; the checkpoint is in {args.folder}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
