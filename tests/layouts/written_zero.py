"""Writes ZeRO checkpoints of any sizes in the structure that DeepSpeed's zero_to_fp32.py reads."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import torch


def written(
    stage: int, groups: list[dict[str, torch.Tensor]], ranks: int, *, align: int = 1, keep_padding: bool = False
) -> dict[str, Any]:
    """Files' objects of a checkpoint of these fp32 parameters; moments are the parameters plus 1 and plus 2."""
    files: dict[str, Any] = {}
    shapes = [OrderedDict((name, p.shape) for name, p in group.items()) for group in groups]
    module = {} if stage == 3 else {name: p.bfloat16() for group in groups for name, p in group.items()}
    about = {"module": module, "param_shapes": shapes, "frozen_param_shapes": None, "buffer_names": []}
    for rank in range(ranks):
        flats: list[list[torch.Tensor]] = []
        paddings = []
        for group in groups:
            kinds = [[p.flatten() + shift for p in group.values()] for shift in (0, 1, 2)]
            if stage == 3:
                parts = [[partition(p, rank, ranks) for p in kind] for kind in kinds]
                flats.append([torch.cat([torch.empty(0), *kind]) for kind in parts])
                continue
            total = sum(p.numel() for p in group.values())
            size = -(-total // (ranks * align)) * align
            real = max(min(total - rank * size, size), 0)
            paddings.append(size - real)
            flats.append([partition(torch.cat([torch.empty(0), *kind]), rank, ranks, size) for kind in kinds])
            if not keep_padding:
                flats[-1][0] = flats[-1][0][:real].clone()
        states = {i: {"step": torch.tensor(5.0), "exp_avg": m, "exp_avg_sq": v} for i, (_, m, v) in enumerate(flats)}
        setting = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": list(states)}
        inner = {"state": states, "param_groups": [setting]}
        masters = [flat[0] for flat in flats]
        own: dict[str, Any] = {"zero_stage": stage, "partition_count": ranks}
        if stage == 3:
            own |= {"fp32_flat_groups": masters, "optimizer_state_dict": inner}
        else:
            own |= {"single_partition_of_fp32_groups": masters, "base_optimizer_state": inner}
            own |= {"group_paddings": paddings, "partition_count": [ranks] * len(groups)}
        files[f"x/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {"optimizer_state_dict": own}
        if rank == 0 or stage == 3:
            files[f"x/{f'zero_pp_rank_{rank}_' * (stage == 3)}mp_rank_00_model_states.pt"] = about
    return files


def partition(flat: torch.Tensor, rank: int, ranks: int, size: int | None = None) -> torch.Tensor:
    size = -(-flat.numel() // ranks) if size is None else size
    return torch.cat([flat.flatten(), torch.zeros(size * ranks)])[rank * size : (rank + 1) * size].clone()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def all_saved(files: dict[str, Any]) -> dict[str, bytes]:
    return {path: saved(files[path]) for path in sorted(files)}


def small(stage: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    return written(stage, [{"a": torch.randn(5, 3), "b": torch.randn(7)}, {"c": torch.randn(4)}], 2, align=4)
