"""Checkpoints of training frameworks, each by its own save path where it runs here.

torchtune, torchtitan, nanochat, nanoGPT and Megatron do not: small files in the structure that they document.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict


@dataclass
class Written:
    """A checkpoint, and its optimizers' parameters by name, in the order of their states."""

    path: Path
    names: list[str] = field(default_factory=list)


class Net(torch.nn.Module):
    """Several matrices of one shape, so that shapes alone do not tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))  # type: ignore[no-any-return]


def stepped(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()


def names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def lightning(folder: Path) -> Written:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = Net()

        def training_step(self, batch: Any, index: int) -> None:
            for each in self.optimizers():
                each.zero_grad()
            self.net(batch[0]).square().mean().backward()
            for each in self.optimizers():
                each.step()

        def configure_optimizers(self) -> Any:
            return (
                torch.optim.AdamW(self.net.inner.parameters()),
                torch.optim.SGD(self.net.head.parameters(), 0.1, momentum=0.9),
            )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Module()
        trainer = lightning.Trainer(
            max_steps=2, logger=False, accelerator="cpu", devices=1, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(torch.randn(4, 8))
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
        trainer.save_checkpoint(folder / "last.ckpt")
    return Written(folder / "last.ckpt", names(module))


def accelerate(folder: Path) -> Written:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = accelerate.Accelerator(cpu=True)
        model = Net()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        stepped(model, optimizer)
        accelerator.save_state(str(folder / "state"))
    return Written(folder / "state", names(model))


def torchtitan(folder: Path) -> Written:
    """Its keys, saved with torch's DCP: model at the top, flattened optimizer, schedules, data and counters."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        weights, states = get_state_dict(model, optimizer, options=options)
        state = {
            **weights, "optimizer": states, "lr_scheduler": {"last_epoch": 1}, "dataloader": {"dp_rank_0": b"x"},
            "train_state": {"step": 1, "ntokens_seen": 64},
        }  # fmt: skip
        torch_dcp.save(state, checkpoint_id=folder / "step-1", no_dist=True)
    return Written(folder / "step-1", names(model))


def torchtune(folder: Path, *, by_name: bool = False) -> Written:
    """epoch_0/model-00001-of-00001.safetensors, and recipe_state/recipe_state.pt with seed and counters."""
    from safetensors.torch import save_file

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    state = optimizer.state_dict()
    if by_name:  # as its distributed recipes save it
        keys = dict(enumerate(names(model)))
        state["state"] = {keys[i]: s for i, s in state["state"].items()}
        state["param_groups"][0]["params"] = list(keys.values())
    for inner in ("epoch_0", "recipe_state"):
        (folder / inner).mkdir(parents=True)
    save_file(model.state_dict(), folder / "epoch_0" / "model-00001-of-00001.safetensors", {"format": "pt"})
    recipe = {"optimizer": state, "seed": 1, "epochs_run": 1, "total_epochs": 2, "max_steps_per_epoch": None}
    torch.save(recipe, folder / "recipe_state" / "recipe_state.pt")
    return Written(folder, names(model))


def nanochat(folder: Path) -> Written:
    """model_000010.pt, optim_000010_rank0.pt and meta_000010.json; AdamW and Muon together, as a list of two."""
    model = Net()
    matrices = [p for p in model.inner.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    adam = torch.optim.AdamW([{"params": others[-2:], "lr": 1e-2}, {"params": others[:-2]}], betas=(0.8, 0.95))
    muon = torch.optim.Muon(matrices)
    stepped(model, adam, muon)
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "model_000010.pt")
    torch.save([adam.state_dict(), muon.state_dict()], folder / "optim_000010_rank0.pt")
    meta = {"step": 10, "val_bpb": 1.5, "model_config": {"n_layer": 2}, "user_config": {"run": "dummy"}}
    (folder / "meta_000010.json").write_text(json.dumps(meta, indent=2))
    by_id = {id(p): n for n, p in model.named_parameters()}
    params = [p for o in (adam, muon) for g in o.param_groups for p in g["params"]]
    return Written(folder, [by_id[id(p)] for p in params])


def nanogpt(folder: Path) -> Written:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    saved = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": {"n_layer": 2}, "iter_num": 1,
        "best_val_loss": torch.tensor(1.0), "config": {},
    }  # fmt: skip
    torch.save(saved, folder / "ckpt.pt")
    return Written(folder / "ckpt.pt", names(model))


def megatron_distributed(folder: Path) -> Written:
    """A DCP folder with common.pt and metadata.json."""
    written = torchtitan(folder)
    torch.save({"iteration": 1}, written.path / "common.pt")
    (written.path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return written


def fsdp(folder: Path) -> Written:
    """What accelerate calls the files of FSDP: one for all parameters and one for their optimizer, by name."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    state, keys = optimizer.state_dict(), dict(enumerate(names(model)))
    groups = [{**g, "params": [keys[i] for i in g["params"]]} for g in state["param_groups"]]
    torch.save(model.state_dict(), folder / "pytorch_model_fsdp.bin")
    torch.save(
        {"state": {keys[i]: s for i, s in state["state"].items()}, "param_groups": groups}, folder / "optimizer.bin"
    )
    return Written(folder, names(model))


WRITERS: dict[str, Callable[[Path], Written]] = {
    "Lightning": lightning,
    "Accelerate": accelerate,
    "torchtitan": torchtitan,
    "torchtune": torchtune,
    "nanochat": nanochat,
    "nanoGPT": nanogpt,
    "Megatron distributed checkpoint": megatron_distributed,
    "FSDP, full state dict": fsdp,
}
