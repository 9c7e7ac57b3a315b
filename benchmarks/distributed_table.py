"""A sharded checkpoint of two ranks beside others': size, time to save, and what numbers of ranks go on from it.

    python benchmarks/distributed_table.py [--width 1152] [--runs 5]     -> benchmarks/results/distributed_table.json

Networks of linear layers under FSDP2 (gloo, CPUs), with random gradients. Size and time: of one with square matrices,
saved after one step. The time is that of the processors, of both ranks, the median of the runs: it does not depend on
the disk, nor on what else the machine does. Loading: small ones are trained for two steps and saved; 1, 2 and 3 ranks
load that, take three more steps with the gradients that the saving run goes on with, and compare weights. Once with
rows that all of them share evenly and that are multiples of everybody's groups; once with rows where neither holds.
FlashOptim runs in Triton's interpreter: its steps are slow, saving is not.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import CACHE, record
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from statecodec import optim
from statecodec.distributed import StatecodecReader, StatecodecWriter
from statecodec.optim.sharding import whole
from tests.distributed.ranks import Ranks
from tests.optim.published import flash

FOLDER = CACHE / "distributed_table"
WORLD, BEFORE, AFTER, LR = 2, 2, 3, 1e-3
EVEN, UNEVEN = (192,) * 5, (70, 250, 50)  # widths of layers


@dataclass(frozen=True)
class Contender:
    """An optimizer and what writes its checkpoint."""

    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    dtype: torch.dtype
    writer: dict[str, Any] | None = None
    """Settings of StatecodecWriter; DCP's own files without."""


def torchao(model: nn.Module) -> Any:
    """8-bit states; weights and masters are one fp32 tensor."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=LR)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """torch's."""
    return torch.optim.AdamW(model.parameters(), lr=LR)


def flashoptim(model: nn.Module) -> torch.optim.Optimizer:
    """The published package, with its defaults: 8-bit states, bf16 weights with 8 bits beside them."""
    return flash("FlashAdamW", model.parameters(), lr=LR)


def ours(model: nn.Module) -> torch.optim.Optimizer:
    """The same things stored."""
    return optim.AdamW(model.named_parameters(), lr=LR)


BF16, FP32 = torch.bfloat16, torch.float32
CONTENDERS = {
    "torch AdamW, DCP": Contender(adamw, FP32),
    "torchao AdamW8bit, DCP": Contender(torchao, FP32),
    "FlashOptim FlashAdamW, DCP": Contender(flashoptim, BF16),
    "statecodec AdamW, DCP": Contender(ours, BF16),
    "statecodec AdamW, StatecodecWriter": Contender(ours, BF16, {"preset": "lossless"}),
    "torch AdamW, StatecodecWriter `lossless`": Contender(adamw, FP32, {"preset": "lossless"}),
    "torch AdamW, StatecodecWriter `resume`": Contender(adamw, FP32, {"preset": "resume"}),
    "torch AdamW, StatecodecWriter `small`": Contender(adamw, FP32, {"preset": "small"}),
}


class Run:
    """One contender on this rank."""

    def __init__(self, name: str, widths: tuple[int, ...]) -> None:
        self.contender = CONTENDERS[name]
        torch.manual_seed(0)
        layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
        self.model: nn.Module = nn.Sequential(*layers).to(self.contender.dtype)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = self.contender.optimizer(self.model)

    def train(self, first: int, steps: int) -> None:
        """Steps with gradients that are functions of the step alone."""
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step)
            for p in self.model.parameters():
                assert isinstance(p, DTensor)
                gradient = torch.randn(p.shape, generator=generator) * 1e-3
                p.grad = distribute_tensor(gradient.to(p.dtype), p.device_mesh, p.placements, src_data_rank=None)
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What is saved."""
        model, states = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": states}

    def save(self, folder: Path) -> None:
        """Into a folder."""
        settings = self.contender.writer
        writer = None if settings is None else StatecodecWriter(folder, **settings)
        dcp.save(self.state(), storage_writer=writer, checkpoint_id=None if writer else folder)

    def load(self, folder: Path) -> None:
        """From there."""
        state = self.state()
        reader = None if self.contender.writer is None else StatecodecReader(folder)
        dcp.load(state, storage_reader=reader, checkpoint_id=None if reader else folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])

    def weights(self) -> list[Tensor]:
        """Whole."""
        return [whole(p.detach()) for p in self.model.parameters()]


def timed(name: str, widths: tuple[int, ...], folder: Path, runs: int) -> list[float]:
    """One step, saved so many times: CPU seconds of each, of all ranks."""
    run, times = Run(name, widths), []
    run.train(0, 1)
    for _ in range(runs):
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        started = time.process_time()
        run.save(folder)
        spent = torch.tensor(time.process_time() - started)
        dist.all_reduce(spent)
        times.append(spent.item())
    return times


def saved(name: str, widths: tuple[int, ...], folder: Path) -> list[Tensor]:
    """Train, save, and go on: the weights at last."""
    run = Run(name, widths)
    run.train(0, BEFORE)
    run.save(folder)
    run.train(BEFORE, AFTER)
    return run.weights()


def resumed(name: str, widths: tuple[int, ...], folder: Path) -> list[Tensor]:
    """Load, and go on: the weights at last."""
    run = Run(name, widths)
    run.load(folder)
    run.train(BEFORE, AFTER)
    return run.weights()


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1152, help="rows and columns of each of four layers")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    arguments = parser.parse_args()
    ranks, folder, result = Ranks(), FOLDER / "checkpoint", {}
    for name in arguments.only:
        FOLDER.mkdir(parents=True, exist_ok=True)
        times = ranks.run(WORLD, timed, name, (arguments.width,) * 5, folder, arguments.runs)[0]
        nbytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        result[name] = {"bytes": nbytes, "save_cpu_seconds": statistics.median(times)}
        result[name] |= {shape: gaps(ranks, name, widths) for shape, widths in (("even", EVEN), ("uneven", UNEVEN))}
        print(name, result[name], flush=True)
    ranks.stop()
    record("distributed_table", {"params": 4 * arguments.width**2, "contenders": result})


def gaps(ranks: Ranks, name: str, widths: tuple[int, ...]) -> dict[str, float | str]:
    """By the number of ranks that load."""
    shutil.rmtree(FOLDER)
    FOLDER.mkdir()
    exact = ranks.run(WORLD, saved, name, widths, FOLDER / "checkpoint")[0]
    return {str(n): gap(ranks, n, name, widths, exact) for n in (1, 2, 3)}


def gap(ranks: Ranks, n: int, name: str, widths: tuple[int, ...], exact: list[Tensor]) -> float | str:
    """The largest difference of a weight, in learning rates; or what was said instead."""
    try:
        again = ranks.run(n, resumed, name, widths, FOLDER / "checkpoint")[0]
    except AssertionError as error:
        said = re.findall(r"^(?:\w+\.)*(\w*Error: .*)", str(error), re.MULTILINE)
        return str(said[-1])[:160]
    return max(((a.float() - b.float()).abs().max() / LR).item() for a, b in zip(again, exact, strict=True))


if __name__ == "__main__":
    main()
