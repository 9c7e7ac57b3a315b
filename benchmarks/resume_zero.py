"""DeepSpeed goes on from restored checkpoints: ZeRO-1, 2 and 3 on two CPU processes, in bf16 and in fp32.

Each is trained, saved and trained on for 8 steps; its checkpoint is compressed at `resume`, restored, loaded by a
new engine, and trained on in the same order. Beside the loss gap stands what rounding the first moments to bf16 does.

    PYTHONPATH=<where deepspeed is> DS_ACCELERATOR=cpu python benchmarks/resume_zero.py    -> results/resume_zero.json
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import CACHE, keep
from tasks import gpt, text

import statecodec

RANKS, BEFORE, AFTER = 2, 60, 8
BF16 = {"bf16": {"enabled": True}}
CASES: dict[str, dict[str, Any]] = {
    f"ZeRO-{stage} {name}": {**config, "zero_optimization": {"stage": stage}}
    for name, config in (("bf16", BF16), ("fp32", {}))
    for stage in (1, 2, 3)
}


def engine(config: dict[str, Any]) -> Any:
    """A small GPT in an engine of DeepSpeed, with AdamW."""
    import deepspeed

    torch.manual_seed(0)
    model = gpt(2, 192)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
    common = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "gradient_clipping": 1.0}
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**common, **config})
    return made


def train(made: Any, start: int, steps: int, rank: int) -> list[float]:
    """Losses, averaged over ranks."""
    losses = []
    for step in range(start, start + steps):
        tokens, targets = text(2, None, step * RANKS + rank)
        loss = torch.nn.functional.cross_entropy(made(tokens).flatten(0, 1).float(), targets.flatten())
        made.backward(loss)
        made.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / RANKS)
    return losses


def rounded(folder: Path) -> None:
    """The first moments of a checkpoint through bf16, as a user would do it."""
    for path in folder.rglob("*optim_states.pt"):
        saved = torch.load(path, weights_only=False)  # written a moment ago, by this script
        own = saved["optimizer_state_dict"]
        inner = own.get("base_optimizer_state") or own["optimizer_state_dict"]
        for state in inner["state"].values():
            state["exp_avg"] = state["exp_avg"].bfloat16().float()
        torch.save(saved, path)


def one(name: str, rank: int, folder: Path) -> dict[str, Any]:
    """A case: bytes, and losses after resuming."""
    resumed = partial(_resumed, CASES[name], rank)
    made = engine(CASES[name])
    train(made, 0, BEFORE, rank)
    made.save_checkpoint(str(folder / "exact"))
    dist.barrier()
    result: dict[str, Any] = {}
    if rank == 0:
        report = statecodec.compress(folder / "exact", folder / "x.sc.safetensors", preset="resume", force=True)
        statecodec.restore(folder / "x.sc.safetensors", folder / "restored")
        shutil.copytree(folder / "exact", folder / "bf16 moments")
        rounded(folder / "bf16 moments")
        state = sum(t.bytes_before for t in report.tensors if t.role != "other")
        result = {"bytes": report.source["bytes"], "compressed": report.bytes, "ratio": report.ratio, "state": state}
    dist.barrier()
    losses = {which: resumed(folder / which) for which in ("exact", "restored", "bf16 moments")}
    for which in ("restored", "bf16 moments"):
        gaps = [abs(a - b) for a, b in zip(losses["exact"], losses[which], strict=True)]
        result[f"largest loss gap, {which}"] = max(gaps)
    return result


def _resumed(config: dict[str, Any], rank: int, folder: Path) -> list[float]:
    made = engine(config)
    made.load_checkpoint(str(folder))
    return train(made, BEFORE, AFTER, rank)


def work(rank: int, folder: str) -> None:
    """All cases, on one rank."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29783")
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    cases = {}
    for name in CASES:
        cases[name] = one(name, rank, Path(folder) / name)
        if rank == 0:
            print(name, cases[name], flush=True)
            keep(
                "resume_zero",
                {"deepspeed": deepspeed.__version__, "steps before": BEFORE, "after": AFTER, "cases": cases},
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    target = CACHE / "resume_zero"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    torch.multiprocessing.spawn(work, (str(target),), nprocs=RANKS)
