"""Train with torchtitan (0.3): its Trainer, an optimizer of encoded states, and compressed checkpoints.

    cd torchtitan  # a checkout: the debug model's tokenizer and text are in it
    export PYTHONPATH=../statecodec
    torchrun --nproc-per-node 8 -m torchtitan.train --module examples.torchtitan_train --config debugmodel

Started again, also on another number of ranks, it goes on from the last whole checkpoint. Two of torchtitan's
components are replaced, each by a subclass: put `Optimizers` and `Checkpoints` into a configuration of your own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torchtitan.components.checkpoint import AsyncMode, CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

import statecodec.optim
from statecodec.distributed import INDEX, StatecodecReader, StatecodecWriter


class Optimizers(OptimizersContainer):
    """Groups of parameters name an optimizer of statecodec: AdamW, Lion, Muon ..."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Any]:
        return getattr(statecodec.optim, name)

    @staticmethod
    def _build_impl_kwargs(config: OptimizersContainer.Config) -> dict[str, Any]:
        return {}  # `fused` and `foreach` are torch's


class Checkpoints(CheckpointManager):
    """Checkpoints written and read by statecodec; when to save and which to keep is torchtitan's."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        preset: str = "resume"
        """How exactly what is not encoded already is stored; see docs/cli.md."""

    def __init__(self, config: Config, **components: Any) -> None:
        super().__init__(config, **components)
        self.preset = config.preset

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, async_mode: AsyncMode, **options: Any) -> Any:
        if options.get("to_hf"):
            return super().dcp_save(state_dict, checkpoint_id, async_mode, **options)
        writer = StatecodecWriter(checkpoint_id, preset=self.preset)
        if async_mode == AsyncMode.DISABLED:
            return dcp.save(state_dict, storage_writer=writer)
        return dcp.async_save(state_dict, storage_writer=writer, process_group=self.pg)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        if from_hf:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        else:
            dcp.load(state_dict, storage_reader=StatecodecReader(checkpoint_id))
            self.states["model"].load_state_dict(state_dict)

    def _find_load_step(self, folder: str = "") -> int:
        whole = Path(folder or self.folder).glob(f"step-*/{INDEX}")
        return max((int(index.parent.name.removeprefix("step-")) for index in whole), default=-1)


def debugmodel() -> Trainer.Config:
    """torchtitan's Llama of 6 M parameters, with both."""
    config = llama3_debugmodel()
    adamw = {"lr": 8e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    groups = [ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=adamw)]
    config.optimizer = Optimizers.Config(param_groups=groups)
    config.checkpoint = Checkpoints.Config(enable=True, interval=5, last_save_model_only=False)
    return config
