"""Finds, in one file's description, the optimizers, the weights and the tensors that are neither."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from statecodec.layouts.base import Role
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.layouts.walk import Place, spell, walk
from statecodec.names import bare_name, shown

STATE_ROLES: Final[dict[str, Role]] = {
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "square_avg": "exp_avg_sq",  # RMSprop's name for the same average
    "max_exp_avg_sq": "max_exp_avg_sq",
    "max_exp_avg_sqs": "max_exp_avg_sq",
    "momentum_buffer": "momentum",
    "master_param": "weight",
}
_MASTER_KEYS: Final = frozenset(
    {
        "single_partition_of_fp32_groups",
        "fp32_flat_groups",
        "fp32_from_fp16_params",
        "fp32_from_fp16_groups",
        "master_params",
    }
)
_OTHER_WORDS: Final = ("rng", "random", "sched", "scaler", "callback", "loops", "sampler", "metric")
_BUFFER: Final = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|inv_freq|original_inv_freq|position_ids|token_type_ids|masked_bias"
    r"|(attn_|causal_|tril_)?mask|tril|cos_cached|sin_cached|freqs_cis|freqs_cos|freqs_sin|relative_position_index|n_averaged)$"
)
_PICKLED: Final = re.compile(r"(?<![^.])(_modules|_parameters)\.")  # a model saved as an object, not as a state dict


@dataclass
class Group:
    """One param_group: its ids in order, the names that the file gives for them, and its settings."""

    node: DictNode
    ids: list[int | str]
    names: list[str] | None


@dataclass
class Optimizer:
    """One optimizer's state_dict."""

    place: Place
    groups: list[Group]
    states: dict[int | str, DictNode]
    parent: DictNode | None

    def shapes(self) -> list[list[tuple[int, ...] | None]]:
        """Each group's parameters' shapes, as far as their states tell."""
        return [[_param_shape(self.states.get(i)) for i in group.ids] for group in self.groups]


@dataclass
class Weight:
    """A tensor of a model's state dict; `top` tells several models of a file apart (model, model_ema ...)."""

    name: str
    top: str
    node: TensorNode


@dataclass
class Survey:
    """What a file holds. Keys of `roles` are id()s of tensor nodes; tensors that are not there are "other"."""

    optimizers: list[Optimizer] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    roles: dict[int, Role] = field(default_factory=dict)


def parameter_name(name: str) -> str:
    """The name that the bare model gives a parameter: without what compile, DDP, FSDP or pickling wrap around it."""
    return bare_name(_PICKLED.sub("", shown(name)))


def survey(root: Any) -> Survey:
    """Look through a description (of a torch file, or of a safetensors file as one dict)."""
    found = Survey()
    bare = _is_state_dict(root)
    parents: dict[int, DictNode] = {}
    for place, node in walk(root):
        if type(node) is TensorNode:
            _tensor(found, place, node, bare)
            continue
        if type(node) is not DictNode:
            if place.key in _MASTER_KEYS and not place.inside:
                place.inside = "master"
            continue
        optimizer = _optimizer(place, node, parents)
        if optimizer is not None:
            place.inside = "optimizer"
            found.optimizers.append(optimizer)
            _state_roles(found, optimizer)
        elif not place.inside or place.inside == "state dict":
            place.inside = _inside(place, node)
            for _, child in node.items:
                if type(child) is DictNode:
                    parents.setdefault(id(child), node)
    return found


def _inside(place: Place, node: DictNode) -> str:
    key = place.key.lower() if type(place.key) is str and place.parent is not None else ""
    if key == "_buffers" or any(word in key for word in _OTHER_WORDS):
        return "other"
    return "state dict" if _is_state_dict(node) else ""


def _is_state_dict(node: Any) -> bool:
    """Mostly tensors under string keys, at least one of them with floating-point numbers and a dimension."""
    if type(node) is not DictNode or not node.items or not all(type(k) is str for k, _ in node.items):
        return False
    tensors = [v for _, v in node.items if type(v) is TensorNode]
    return len(tensors) * 5 >= len(node.items) * 4 and any(t.shape and _has_fractions(t.dtype) for t in tensors)


def _tensor(found: Survey, place: Place, node: TensorNode, bare: bool) -> None:
    if place.inside in ("optimizer", "other") or id(node) in found.roles:
        return
    if place.inside == "master":
        found.roles[id(node)] = "weight"
        return
    leaf = place.key.rpartition(".")[2] if type(place.key) is str else ""
    if leaf in STATE_ROLES:
        if node.dtype.is_floating_point:
            found.roles[id(node)] = STATE_ROLES[leaf]
        return
    if (
        (place.inside != "state dict" and not node.is_parameter)
        or not _has_fractions(node.dtype)
        or _is_buffer(place, node)
    ):
        return
    path = str(place)
    top = "" if bare or place.parent is None or place.parent.parent is None else spell(place.top)
    name = parameter_name(path[len(top) + 1 :] if top and path.startswith(top + ".") else path)
    found.roles[id(node)] = "weight"
    found.weights.append(Weight(name, top, node))


def _has_fractions(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_buffer(place: Place, node: TensorNode) -> bool:
    if type(place.key) is not str or node.is_parameter:
        return False
    shape = node.shape
    causal_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] and place.key.endswith(".bias")
    return causal_mask or _BUFFER.search(place.key) is not None


def _optimizer(place: Place, node: DictNode, parents: dict[int, DictNode]) -> Optimizer | None:
    """The optimizer that a dict with `state` and `param_groups` is, if its contents fit."""
    if len(node.items) > 64 or place.inside == "optimizer":
        return None
    state, groups = node.get("state"), node.get("param_groups")
    if type(state) is not DictNode or type(groups) is not list or not all(type(g) is DictNode for g in groups):
        return None
    return Optimizer(
        place,
        [_group(g) for g in groups],
        {k: v for k, v in state.items if type(v) is DictNode and _is_id(k)},
        parents.get(id(node)),
    )


def _is_id(key: Any) -> bool:
    return type(key) is str or (type(key) is int and 0 <= key < 1 << 31)


def _group(node: DictNode) -> Group:
    params, names = node.get("params"), node.get("param_names")
    ids = params if type(params) is list and all(_is_id(p) for p in params) else []
    if all(type(i) is str for i in ids):
        names = ids
    fits = type(names) is list and len(names) == len(ids) and all(type(n) is str for n in names)
    return Group(node, ids, names if fits else None)


def _state_roles(found: Survey, optimizer: Optimizer) -> None:
    for state in optimizer.states.values():
        for key, value in state.items:
            if type(value) is not TensorNode or type(key) is not str:
                continue
            if key == "step" and math.prod(value.shape) == 1:
                found.roles[id(value)] = "step"
            elif key in STATE_ROLES and value.dtype.is_floating_point:
                found.roles[id(value)] = STATE_ROLES[key]


def _param_shape(state: DictNode | None) -> tuple[int, ...] | None:
    if state is None:
        return None
    for key in (*STATE_ROLES, "state1"):  # state1: bitsandbytes, shaped like the parameter
        value = state.get(key)
        if type(value) is TensorNode:
            return value.shape
    others = {v.shape for k, v in state.items if type(v) is TensorNode and v.shape and k != "step"}
    return others.pop() if len(others) == 1 else None
