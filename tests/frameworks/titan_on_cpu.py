"""torchtitan's Trainer with the configuration of examples/torchtitan_train.py, on CPUs. Run by test_torchtitan.py.

torchrun --nproc-per-node N titan_on_cpu.py FOLDER STEPS [DIES_AT]

torchtitan expects an accelerator: what it asks of one is answered here. Its loop, optimizer container, schedules and
checkpoint manager are its own.
"""

# ruff: noqa: E402 - its questions are answered before it is imported
from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils

torch._utils._get_available_device_type = lambda: "cpu"  # before torchtitan asks
ACCELERATOR = {
    "get_device_name": lambda _: "CPU", "get_device_properties": lambda _: SimpleNamespace(total_memory=1 << 34),
    "memory_stats": lambda _: {}, "reset_peak_memory_stats": lambda: None, "empty_cache": lambda: None,
}  # fmt: skip
for name, answer in ACCELERATOR.items():
    setattr(torch.cpu, name, answer)

from torch.distributed.fsdp import FSDPModule
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed import utils
from torchtitan.models.common.attention import ScaledDotProductAttention

from examples.torchtitan_train import Checkpoints, debugmodel

utils.set_pg_timeouts = lambda **_: None  # a barrier on a device
SAMPLES, LENGTH, EVERY = 12, 32, 2


class Tokens(BaseDataLoader):
    """Repeating numbers; a step's samples are the same on any number of ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, **_: Any) -> None:
        self.world, self.rank, self.done = dp_world_size, dp_rank, 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(self.done + self.rank)
            tokens = torch.randint(50, (1, 4), generator=generator).repeat(1, LENGTH)[:, : LENGTH + 1]
            self.done += self.world
            yield {"input": tokens[:, :-1], "positions": torch.arange(LENGTH)[None]}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["samples"]


class NoTokenizer(BaseTokenizer):
    """The numbers are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any) -> list[int]:
        return []

    def decode(self, *_: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return 2048


def main(folder: str, steps: int, dies_at: int) -> None:
    config = debugmodel()
    config.dump_folder, config.validator.enable, config.checkpoint.interval = folder, False, EVERY
    config.dataloader, config.tokenizer = Tokens.Config(), NoTokenizer.Config()
    config.parallelism.spmd_backend = "partial_dtensor"  # the others ask for a newer torch
    training, model = config.training, config.model_spec.model
    training.steps, training.seq_len, training.disable_cuda_graphs = steps, LENGTH, True
    training.local_batch_size, training.global_batch_size = 1, SAMPLES
    config.lr_scheduler.warmup_steps, config.lr_scheduler.total_steps = 0, 100
    config.debug.seed = 0
    model.layers = model.layers[:1]
    model.layers[0].attention.inner_attention = ScaledDotProductAttention.Config()  # the others need a GPU
    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows sums only
    losses: dict[int, float] = {}
    trainer.metrics_processor.log = lambda step, loss, *_, **__: losses.update({step: loss})
    if dies_at:
        save = Checkpoints.dcp_save

        def dying(self: Checkpoints, state_dict: Any, checkpoint_id: str, *options: Any, **named: Any) -> Any:
            if checkpoint_id.endswith(f"step-{dies_at}") and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return save(self, state_dict, checkpoint_id, *options, **named)

        Checkpoints.dcp_save = dying  # type: ignore[method-assign]
    trainer.train()
    trainer.close()
    if torch.distributed.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else 0)
