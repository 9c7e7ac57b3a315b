"""Moments get the names of their weights where frameworks keep the two in different files, sorted differently."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from statecodec.layouts import locate
from tests.frameworks.huggingface import MODELS, Trained, parameter_names, quiet

# What transformers calls a module in memory, and in files.
IN_FILES = {
    "gpt_neox": {"lm_head": "embed_out"},
    "vit": {
        "vit.layers": "vit.encoder.layer", "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    },
}  # fmt: skip


def in_file(model: str, name: str) -> str:
    for ours, theirs in IN_FILES.get(model, {}).items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("model", [model for model in MODELS if model != "llama of one width"])
def test_all_moments_of_trainer_are_named(by_trainer: Callable[[str], Trained], model: str) -> None:
    saved = by_trainer(model)
    moments = locate(saved.folder).moments
    truth = [in_file(model, name) for name in saved.names]
    assert [m.param for m in moments] == truth
    assert [m.weight for m in moments] == [f"model.safetensors:{name}" for name in truth]


def test_what_two_versions_make_in_another_order_has_no_name(by_trainer: Callable[[str], Trained]) -> None:
    """Older ones made `down_proj` before `up_proj`; here both are square, so shapes do not tell."""
    saved = by_trainer("llama of one width")
    assert [m.param for m in locate(saved.folder).moments] == [
        None if name.endswith(("up_proj.weight", "down_proj.weight")) else name for name in saved.names
    ]


def test_weights_in_several_shards(tmp_path: Path) -> None:
    with quiet():
        model = MODELS["llama"]()
        model.save_pretrained(tmp_path, max_shard_size="4KB")
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert [m.param for m in locate(tmp_path).moments] == parameter_names(model, optimizer)


@pytest.mark.parametrize("model", ["gpt2", "llama", "gpt_neox", "vit", "resnet"])
def test_a_file_sorted_by_name_is_in_no_model_s_order(
    by_trainer: Callable[[str], Trained], model: str, tmp_path: Path
) -> None:
    """safetensors that somebody loaded and saved with torch: the file's order is that of the alphabet."""
    saved = by_trainer(model)
    shutil.copy(saved.folder / "optimizer.pt", tmp_path)
    weights = load_file(saved.folder / "model.safetensors")
    torch.save({key: weights[key] for key in sorted(weights)}, tmp_path / "model.pt")
    assert [m.param for m in locate(tmp_path).moments] == [in_file(model, name) for name in saved.names]
