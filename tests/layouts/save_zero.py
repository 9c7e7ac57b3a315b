"""Writes tests/layouts/data/deepspeed.zip: checkpoints of DeepSpeed's own save path, after real steps on three ranks.

    PYTHONPATH=<where deepspeed is> DS_ACCELERATOR=cpu python tests/layouts/save_zero.py

DeepSpeed is not among the things that tests need (it wants a compiler for most of what it does), so its files are kept.
For each of NAMES there is a folder as `save_checkpoint` writes it, without zero_to_fp32.py, and NAME.pt: what
that script's function makes of it (of the bf16 optimizer's files nothing). VERSIONS.txt says what wrote them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

RANKS = 3
BF16 = {"bf16": {"enabled": True}}
NAMES: dict[str, dict[str, Any]] = {
    "zero1": {**BF16, "zero_optimization": {"stage": 1}},
    "zero1_bf16_optimizer": {
        **BF16,
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero2": {**BF16, "zero_optimization": {"stage": 2}},
    "zero3": {**BF16, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


class Net(nn.Module):
    """Odd sizes, a tied head, a frozen layer, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(33, 16)
        self.fc = nn.Linear(16, 35)
        self.frozen = nn.Linear(35, 35).requires_grad_(False)
        self.out = nn.Linear(35, 16)
        self.head = nn.Linear(16, 33, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("scale", torch.ones(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.out(self.frozen(self.fc(self.emb(tokens)))) * self.scale[0]
        return nn.functional.linear(x, self.emb.weight)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29781")
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    deepspeed.init_distributed("gloo", verbose=False)
    for name, config in NAMES.items():
        torch.manual_seed(0)
        model = Net()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(groups(model), lr=1e-3, betas=(0.9, 0.95)),
            config={"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True, **config},
        )
        for _ in range(3):
            tokens = torch.randint(0, 33, (4, 8))
            loss = nn.functional.cross_entropy(engine(tokens).flatten(0, 1).float(), tokens.flatten())
            engine.backward(loss)
            engine.step()
        engine.save_checkpoint(f"{folder}/{name}", client_state={"note": torch.arange(3)})
        dist.barrier()
        if rank == 0:
            if "data_types" not in config:
                torch.save(dict(get_fp32_state_dict_from_zero_checkpoint(f"{folder}/{name}")), f"{folder}/{name}.pt")
            Path(f"{folder}/{name}/zero_to_fp32.py").unlink()
            about = f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__}, {RANKS} ranks on CPU (gloo)\n"
            Path(f"{folder}/VERSIONS.txt").write_text(about)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    target = Path(__file__).parent / "data" / "deepspeed.zip"
    with tempfile.TemporaryDirectory() as written:
        torch.multiprocessing.spawn(work, (written,), nprocs=RANKS)
        target.parent.mkdir(exist_ok=True)
        shutil.make_archive(str(target.with_suffix("")), "zip", written)
    print(target, target.stat().st_size, len(zipfile.ZipFile(target).namelist()))
