"""Tiny models of transformers, and checkpoints of them that its Trainer and accelerate write."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 64, "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 1}
IMAGE = {
    "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def made(kind: str, config: str, /, **options: Any) -> Callable[[], torch.nn.Module]:
    """A function that makes a model with random weights from transformers' classes of these names."""

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        model: torch.nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**options))
        return model

    return make


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "gpt2": made("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_positions=16, n_embd=8, n_layer=2, n_head=2,
                 bos_token_id=1, eos_token_id=2),
    "llama": made("LlamaForCausalLM", "LlamaConfig", **{**GROUPED, "num_hidden_layers": 12}),
    "llama of one width": made("LlamaForCausalLM", "LlamaConfig", **{**TEXT, "intermediate_size": 8}),
    "qwen2": made("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "qwen3": made("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=4),
    "gemma2": made("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=4),
    "phi3": made("Phi3ForCausalLM", "Phi3Config", **GROUPED),
    "gpt_neox": made("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT),
    "vit": made("ViTForImageClassification", "ViTConfig", **IMAGE),
    "resnet": made("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16],
                   depths=[2, 2], num_channels=3),
    "bert": made("BertForSequenceClassification", "BertConfig", **TEXT),
    "roberta": made("RobertaForSequenceClassification", "RobertaConfig", **TEXT),
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A checkpoint directory, what its optimizer's parameters are called, by their number, and logged losses."""

    folder: Path
    names: list[str]
    losses: list[float]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that frameworks give about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        yield


def examples(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """Two training examples of the kind that the model takes."""
    generator = torch.Generator().manual_seed(0)
    if "ForCausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        tokens = [torch.randint(3, 64, (12,), generator=generator) for _ in range(2)]
        return [{"input_ids": t, "labels": t} for t in tokens]
    labels = [torch.tensor(i) for i in range(2)]
    if "Image" in type(model).__name__:
        size = 8 if "ViT" in type(model).__name__ else 16
        return [{"pixel_values": torch.randn(3, size, size, generator=generator), "labels": i} for i in labels]
    return [{"input_ids": torch.randint(3, 64, (12,), generator=generator), "labels": i} for i in labels]


def parameter_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimizer's parameters, by identity."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def trained(
    model: torch.nn.Module, folder: Path, steps: int = 1, *, data: list[dict[str, torch.Tensor]] | None = None,
    resume: Path | None = None, **options: Any,
) -> Trained:  # fmt: skip
    """Train with the Trainer (`options` are its arguments), which writes `checkpoint-STEPS` into the folder."""
    usual = {"save_steps": steps, "per_device_train_batch_size": 2, "logging_strategy": "no"}
    with quiet():
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
            **usual | options,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data or examples(model))
        trainer.train(resume_from_checkpoint=resume and str(resume))
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(folder / f"checkpoint-{steps}", parameter_names(model, optimizer), losses)
