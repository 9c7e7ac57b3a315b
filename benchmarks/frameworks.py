"""Training inside of frameworks: a small GPT, or a small model of transformers, on the same text.

A run trains BEFORE steps, has its framework save, and goes on for AFTER steps; or it loads what was saved and only goes
on. It returns the checkpoint and the losses of the last AFTER steps, which depend on nothing but the checkpoint.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
from common import ROOT
from tasks import BLOCK, TRAINED, corpus, gpt, text
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(ROOT.parent))  # the writers that tests have, too

BEFORE, AFTER, RANKS, BATCH, LR = 60, 8, 2, 64, 6e-4
Run: TypeAlias = Callable[[Path, "Path | None"], "tuple[Path, list[float]]"]


def model(seed: int = 0) -> nn.Module:
    """A GPT of 0.95 million parameters, always the same."""
    torch.manual_seed(seed)
    return gpt(2, 192)


def adamw(net: nn.Module) -> Optimizer:
    """Matrices with weight decay, vectors without, as most training scripts have it."""
    groups = [
        {"params": [p for p in net.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))


def losses(
    net: Callable[[Tensor], Tensor],
    stepped: Callable[[Tensor], None],
    start: int,
    stop: int,
    rank: int | None = None,
    order: int = TRAINED,
) -> list[float]:
    """Losses of steps; a rank has its share of each batch. `stepped` goes backward and takes the step."""
    found = []
    for step in range(start, stop):
        batch = text(BATCH, order, step)
        tokens, targets = batch if rank is None else (t.chunk(RANKS)[rank] for t in batch)
        loss = nn.functional.cross_entropy(net(tokens).flatten(0, 1).float(), targets.flatten())
        stepped(loss)
        found.append(loss.item())
    return found


def stepping(
    optimizer: Optimizer, backward: Callable[[Tensor], Any] = torch.Tensor.backward
) -> Callable[[Tensor], None]:
    """`stepped` of an ordinary loop."""

    def stepped(loss: Tensor) -> None:
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return stepped


# ---- one process


def plain(make: Callable[[nn.Module], Optimizer], folder: Path, resume: Path | None) -> tuple[Path, list[float]]:
    """A loop of one's own, and torch.save."""
    # The steps of torchao need no compiler to be right.
    with warnings.catch_warnings(), mock.patch.object(torch, "compile", lambda function, **_: function):
        warnings.simplefilter("ignore")
        net = model()
        optimizer = make(net)
        stepped = stepping(optimizer)
        path = folder / "ckpt.pt"
        if resume is None:
            losses(net, stepped, 0, BEFORE)
            folder.mkdir(parents=True)
            torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": BEFORE}, path)
        else:
            saved = torch.load(resume, weights_only=True)
            net.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        return path, losses(net, stepped, BEFORE, BEFORE + AFTER)


def optimizer_of(package: str, name: str, net: nn.Module) -> Optimizer:
    """An optimizer of bitsandbytes or torchao."""
    made: Optimizer = getattr(importlib.import_module(f"{package}.optim"), name)(net.parameters(), lr=LR)
    return made


def trainer(kind: str, lr: float, folder: Path, resume: Path | None) -> tuple[Path, list[float]]:
    """Transformers' Trainer: GPT-2 in fp32, or Llama in bf16."""
    from tests.frameworks.huggingface import made, trained

    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 256}
    if kind == "gpt2":
        net = made("GPT2LMHeadModel", "GPT2Config", n_positions=BLOCK, n_embd=192, n_layer=4, n_head=6, **tokens)()
    else:
        net = made(
            "LlamaForCausalLM",
            "LlamaConfig",
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            **tokens,
        )().bfloat16()
    windows = corpus().train[: (BEFORE + AFTER) * BATCH * BLOCK].long().view(-1, BLOCK)
    done = trained(
        net,
        folder,
        BEFORE + AFTER,
        data=[{"input_ids": t, "labels": t} for t in windows],
        resume=resume,
        save_steps=BEFORE,
        per_device_train_batch_size=BATCH,
        learning_rate=lr,
        lr_scheduler_type="constant",
        logging_strategy="steps",
        logging_steps=1,
        bf16=kind != "gpt2",
    )
    return folder / f"checkpoint-{BEFORE}", done.losses[-AFTER:]


def accelerate(averaged: bool, folder: Path, resume: Path | None) -> tuple[Path, list[float]]:
    """Accelerate's save_state and load_state, without or with a registered average of the weights by torch."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    accelerator = Accelerator(cpu=True)
    bare = model()
    net, optimizer = accelerator.prepare(bare, adamw(bare))
    average = AveragedModel(bare, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    if averaged:
        accelerator.register_for_checkpointing(average)
    taken = stepping(optimizer, accelerator.backward)

    def stepped(loss: Tensor) -> None:
        taken(loss)
        average.update_parameters(bare)

    path = folder / "step"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if resume is None:
            losses(net, stepped, 0, BEFORE)
            accelerator.save_state(str(path))
        else:
            accelerator.load_state(str(resume))
        return path, losses(net, stepped, BEFORE, BEFORE + AFTER)


def lightning(folder: Path, resume: Path | None) -> tuple[Path, list[float]]:
    """Lightning's own loop and ModelCheckpoint."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = nn.functional.cross_entropy(self.net(batch[0][0]).flatten(0, 1), batch[1][0].flatten())
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return adamw(self.net)

    # An epoch ends where it is saved: in the middle of one Lightning would begin its data again.
    data = [text(BATCH, TRAINED, n) for n in range(BEFORE // 3)]
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        Trainer(
            max_steps=BEFORE + AFTER,
            logger=False,
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[ModelCheckpoint(folder, filename="last", every_n_train_steps=BEFORE, save_top_k=-1)],
        ).fit(module, torch.utils.data.DataLoader(data), ckpt_path=resume)  # type: ignore[arg-type]
    return folder / "last.ckpt", module.losses[-AFTER:]


# ---- several processes


def on_ranks(work: Callable[[int, str, str | None], None], folder: Path, resume: Path | None) -> list[float]:
    """Run `work` on RANKS processes, which leave their losses in the folder; the averages over ranks."""
    folder.mkdir(parents=True)
    torch.multiprocessing.spawn(work, (str(folder), resume and str(resume)), nprocs=RANKS)
    found = [json.loads((folder / f"losses{rank}.json").read_text()) for rank in range(RANKS)]
    return [sum(each) / RANKS for each in zip(*found, strict=True)]


def fsdp2(flat: bool, folder: Path, resume: Path | None) -> tuple[Path, list[float]]:
    """torch's FSDP2, saved by torch.distributed.checkpoint; the optimizer's state nested or flattened (torchtitan)."""
    found = on_ranks(partial(_fsdp2, flat), folder, resume)
    return folder / "saved", found


def _fsdp2(flat: bool, rank: int, folder: str, resume: str | None) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    net = model()
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in net.get_submodule("transformer.h").children():
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = adamw(net)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    stepped = stepping(optimizer)
    if resume is None:
        losses(net, stepped, 0, BEFORE, rank)
        weights, states = get_state_dict(net, optimizer, options=options)
        dcp.save({"model": weights, "optimizer": states, "step": BEFORE}, checkpoint_id=f"{folder}/saved")
    else:
        weights, states = get_state_dict(net, optimizer, options=options)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=resume)
        set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=states, options=options)
    found = losses(net, stepped, BEFORE, BEFORE + AFTER, rank)
    Path(folder, f"losses{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def deepspeed(stage: int, bf16: bool, folder: Path, resume: Path | None) -> tuple[Path, list[float]]:
    """DeepSpeed's ZeRO; needs DS_ACCELERATOR=cpu where there is no GPU."""
    return folder / "saved", zero(stage, bf16, 0, [(resume, TRAINED)], folder)[0][:-1]


def zero(stage: int, bf16: bool, seed: int, runs: Sequence[tuple[Path | None, int]], folder: Path) -> list[list[float]]:
    """Runs of ZeRO, each resumed from a checkpoint (or none: it saves one) in a data order, all on the same processes.

    Of each the losses of AFTER steps, and the held-out loss after them.
    """
    named = [(str(resume) if resume else None, order) for resume, order in runs]
    found = on_ranks(partial(_zero, stage, bf16, seed, named), folder, None)
    return [found[at : at + AFTER + 1] for at in range(0, len(found), AFTER + 1)]


def _zero(
    stage: int, bf16: bool, seed: int, runs: list[tuple[str | None, int]], rank: int, folder: str, _: str | None
) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29783")
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed("gloo", verbose=False)
    found: list[float] = []
    for resume, order in runs:
        net = model(seed)
        made, *_ = deepspeed.initialize(
            model=net,
            optimizer=adamw(net),
            config={
                "train_micro_batch_size_per_gpu": BATCH // RANKS,
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": bf16},
                "zero_optimization": {"stage": stage},
            },
        )

        def stepped(loss: Tensor, made: Any = made) -> None:
            made.backward(loss)
            made.step()

        if resume is None:
            losses(made, stepped, 0, BEFORE, rank)
            made.save_checkpoint(f"{folder}/saved")
        else:
            made.load_checkpoint(resume)
        found += losses(made, stepped, BEFORE, BEFORE + AFTER, rank, order)
        with torch.no_grad():
            tokens, targets = text(BATCH, None, 0)
            held_out = nn.functional.cross_entropy(made(tokens).flatten(0, 1).float(), targets.flatten())
        found.append(held_out.item())
    Path(folder, f"losses{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
