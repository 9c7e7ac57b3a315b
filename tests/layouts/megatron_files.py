"""Checkpoints in Megatron-LM's documented structure. It does not run without GPUs, so they are written here.

Legacy: megatron/training/checkpointing.py and optimizer.Float16OptimizerWithFloat16Params.state_dict; with a
distributed optimizer its get_parameter_state_dp_zero. Distributed: core/dist_checkpointing, whose common.pt holds the
optimizer's settings and whose DCP files hold its states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHAPES = {
    "embedding.word_embeddings.weight": (96, 64),
    "decoder.layers.0.input_layernorm.weight": (64,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (192, 64),
    "decoder.layers.0.self_attention.linear_qkv.bias": (192,),
    "decoder.layers.0.mlp.linear_fc1.weight": (256, 64),
    "decoder.layers.1.input_layernorm.weight": (64,),
    "decoder.layers.1.self_attention.linear_qkv.weight": (192, 64),
    "decoder.layers.1.self_attention.linear_qkv.bias": (192,),
    "decoder.layers.1.mlp.linear_fc1.weight": (256, 64),
}
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "bias_correction": True}


def masters(shapes: dict[str, Any] = SHAPES) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}


def moments(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"exp_avg": torch.randn_like(weight) * 1e-5, "exp_avg_sq": torch.rand_like(weight) * 1e-8 + 1e-12}


def legacy(folder: Path) -> dict[str, torch.Tensor]:
    """iter_0000010/mp_rank_00/model_optim_rng.pt: weights bf16, one group with weight decay and one without."""
    weights = masters()
    groups = [[n for n in weights if weights[n].dim() > 1], [n for n in weights if weights[n].dim() == 1]]
    numbers = {name: i for i, name in enumerate(n for group in groups for n in group)}
    inner = {
        "state": {i: moments(weights[name]) for name, i in numbers.items()},
        "param_groups": [
            {**SETTINGS, "weight_decay": decay, "step": 10, "params": [numbers[n] for n in group]}
            for group, decay in zip(groups, (0.1, 0.0), strict=True)
        ],
    }
    path = folder / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    optimizer = {"optimizer": inner, "fp32_from_fp16_params": [[weights[n] for n in group] for group in groups]}
    model = {name: weight.bfloat16() for name, weight in weights.items()}
    torch.save({"iteration": 10, "checkpoint_version": 3.0, "model": model, "optimizer": optimizer}, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return weights


def flat_buffer(weights: list[torch.Tensor]) -> dict[str, Any]:
    """Masters and moments of parameters, each from a multiple of 64 on."""
    flat: dict[str, list[torch.Tensor]] = {"param": [], "exp_avg": [], "exp_avg_sq": []}
    for weight in weights:
        for key, tensor in {"param": weight, **moments(weight)}.items():
            flat[key] += [torch.zeros(-sum(t.numel() for t in flat[key]) % 64), tensor.flatten()]
    buffer: dict[str, Any] = {key: torch.cat(parts) for key, parts in flat.items()}
    return {**buffer, "numel_unpadded": buffer["param"].numel()}


def distributed_optimizer(folder: Path, shapes: dict[str, Any] = SHAPES) -> Path:
    """A rank's folder with settings in model_optim_rng.pt, and one flat buffer of each kind in distrib_optim.pt.

    Parameters stand in the reverse of the model's order.
    """
    weights = masters(shapes)
    buffer = flat_buffer(list(reversed(weights.values())))
    rank = folder / "iter_0000010" / "mp_rank_00"
    rank.mkdir(parents=True)
    groups = [{**SETTINGS, "weight_decay": decay, "step": 10} for decay in (0.1, 0.0)]
    model = {name: weight.bfloat16() for name, weight in weights.items()}
    optimizer = {"optimizer": {"param_groups": groups}, "grad_scaler": {}}
    saved = {"iteration": 10, "checkpoint_version": 3.0, "model": model, "optimizer": optimizer}
    torch.save(saved, rank / "model_optim_rng.pt")
    state = {"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): buffer}}
    torch.save(state, rank / "distrib_optim.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return rank
