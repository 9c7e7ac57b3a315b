"""The state of an optimizer as a state dict: in its own plain form, or as torch.optim would keep it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statecodec.codecs import EncodedTensor
from statecodec.codecs.plain import to_plain
from statecodec.optim import sharding
from statecodec.optim.dense import MOMENTS, decode_moments
from statecodec.optim.method import Group
from statecodec.optim.options import without_numpy
from statecodec.optim.states import StateKeeper


def plain(optimizer: StateKeeper) -> dict[str, Any]:
    """Every encoded tensor in its plain form; parts are shared, not copied."""

    def pack(p: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {k: to_plain(v) if isinstance(v, EncodedTensor) else v for k, v in list(values.items())}

    return _packed(optimizer, pack, lambda group: group)


def dense(optimizer: StateKeeper) -> dict[str, Any]:
    """torch.optim's state: `step` (fp32 on the CPU), the decoded moments, and the group options of the torch class."""
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}

    def pack(p: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        state = optimizer.ensure_state(p, group_of[p])
        moments = {k: v for k, v in state.items() if k in MOMENTS}
        local_moments = decode_moments(moments, p, int(state["step"]), group_of[p])
        decoded = {k: sharding.joined(x, p) for k, x in local_moments.items()}
        return {"step": torch.tensor(float(state["step"]), dtype=torch.float32, device="cpu"), **decoded}

    def torch_group(group: Group) -> Group:
        shared = ("params", "param_names", "lr", "initial_lr", "weight_decay", "maximize")
        return {**optimizer.to_torch_group(group), **{k: group[k] for k in shared if k in group}}

    return _packed(optimizer, pack, torch_group)


def _packed(
    optimizer: StateKeeper, pack: Callable[[Any, dict[str, Any]], dict[str, Any]], convert: Callable[[Group], Group]
) -> dict[str, Any]:
    """A state dict as torch packs one: parameters by position.

    What `state` holds of parameters that belong to no group any more is left out.
    """
    positions: dict[Any, int] = {}
    groups = []
    for group in list(optimizer.param_groups):
        for p in group["params"]:
            positions.setdefault(p, len(positions))
        options = {k: without_numpy(v) for k, v in convert(group).items() if k != "params"}
        groups.append({**options, "params": [positions[p] for p in group["params"]]})
    state = {positions[p]: pack(p, v) for p, v in list(optimizer.state.items()) if p in positions and v}
    return {"state": state, "param_groups": groups}
