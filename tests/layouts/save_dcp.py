"""Trains small models and saves them with torch.distributed.checkpoint, as its own process.

    python save_dcp.py FOLDER

FOLDER/alone is what one rank saves, and FOLDER/sharded two of a model that is large enough for lossy codecs. Each has
checkpoints `nested` and `flat` (the optimizer's state nested, or flattened as torchtitan does it) and, as nested.pt and
flat.pt, what torch's own converter makes of them. FOLDER/sharded/fsdp1 is what FSDP1 saves of such a model: each rank's
sharded_R.pt and local_R.pt, and DCP folders called as accelerate calls them.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(2 * width + 1, width)
        self.fc = nn.Linear(width, 3 * width)
        self.ln = nn.LayerNorm(3 * width)
        self.register_buffer("mask", torch.ones(3, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.ln(self.fc(self.emb(tokens)))


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    if rank == 0:
        save(0, f"{folder}/alone", 1, 8)
    save(rank, f"{folder}/sharded", 2, 64)


def save(rank: int, folder: str, ranks: int, width: int) -> None:
    Path(folder).mkdir(exist_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = Net(width)
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model.fc, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for _ in range(12):
        model(torch.randint(0, 2 * width, (32,))).pow(3).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        weights, states = get_state_dict(model, optimizer, options=options)
        extra = {"list": [1, 2.5, "x"], "tensor": torch.arange(6).view(2, 3)}
        saved = {"model": weights, "optimizer": states, "step": 12, "extra": extra}
        target = Path(folder) / ("flat" if flat else "nested")
        dcp.save(saved, checkpoint_id=target)
        dist.barrier()
        if rank == 0:
            dcp_to_torch_save(target, f"{target}.pt")
    if ranks > 1:
        fsdp1(rank, Path(folder) / "fsdp1", width)
    dist.destroy_process_group()


def fsdp1(rank: int, folder: Path, width: int) -> None:
    torch.manual_seed(0)
    inner = Net(width)
    inner.fc = FullyShardedDataParallel(inner.fc, device_id=torch.device("cpu"))
    model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randint(0, 2 * width, (32,))).pow(3).mean().backward()
    optimizer.step()
    folder.mkdir(exist_ok=True)
    for kind in ("sharded", "local"):
        with FullyShardedDataParallel.state_dict_type(model, StateDictType[f"{kind.upper()}_STATE_DICT"]):
            weights, states = model.state_dict(), FullyShardedDataParallel.optim_state_dict(model, optimizer)
        torch.save({"model": weights, "optimizer": states}, folder / f"{kind}_{rank}.pt")
        if kind == "sharded":
            dcp.save({"model": weights}, checkpoint_id=folder / "state" / "pytorch_model_fsdp_0")
            dcp.save({"optimizer": states}, checkpoint_id=folder / "state" / "optimizer_0")


if __name__ == "__main__":
    other = multiprocessing.get_context("fork").Process(target=work, args=(1, sys.argv[1]))  # it need not import torch
    other.start()
    work(0, sys.argv[1])
    other.join()
    sys.exit(other.exitcode)
