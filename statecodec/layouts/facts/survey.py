"""Finds, in one file's description, the optimizers, the weights and the tensors that are neither."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from statecodec.dtypes import DType
from statecodec.layouts.base import StatePart
from statecodec.layouts.facts.averages import averages_in, is_average
from statecodec.layouts.facts.encoded import state_parts
from statecodec.layouts.facts.quantised import quantised_parts, unwrapped
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.layouts.walk import KeyPath, spell, walk
from statecodec.names import bare_name, shown
from statecodec.roles import STATE_ROLES, Role

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
    r"|(attn_|causal_|tril_)?mask|tril|cos_cached|sin_cached|freqs_cis|freqs_cos|freqs_sin|relative_position_index|n_averaged"
    r"|amax_history|amax)$"
)
_STATE_DICTS: Final = ("state dict", "averages")
_SCALE: Final = re.compile(r"_scale(_inv)?$")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,8}")
_PICKLED: Final = re.compile(r"(?<![^.])(_modules|_parameters)\.")  # a model saved as an object, not as a state dict


Key = int | str
"""A parameter's number or name. Numbers may be spelled as text: JSON and YAML know no other keys."""


@dataclass
class Group:
    """One param_group: its parameters' ids in order, their names where the file gives them, and its settings.

    Ids and names are None where an entry is something else: nothing is guessed then.
    """

    node: DictNode
    ids: list[Key | None]
    names: list[str | None]


@dataclass
class Optimizer:
    """One optimizer's state_dict."""

    path: KeyPath
    groups: list[Group]
    states: dict[Key, DictNode]
    parent: DictNode | None

    def state(self, key: Key | None) -> DictNode | None:
        """The state of a parameter of a group."""
        return None if key is None else self.states.get(key)

    def shapes(self) -> list[list[tuple[int, ...] | None]]:
        """Each group's parameters' shapes, as far as their states tell."""
        return [[_param_shape(self.state(i)) for i in group.ids] for group in self.groups]

    def of_no_group(self) -> dict[Key, DictNode]:
        """The states of parameters that no group has."""
        referred = {key for group in self.groups for key in group.ids}
        return {key: state for key, state in self.states.items() if key not in referred}


@dataclass
class ModelTensor:
    """A tensor of a model's state dict; `top` tells several models of a file apart (model, model_ema ...)."""

    name: str
    top: str
    node: TensorNode
    average: bool
    """It is a running average."""


@dataclass
class Survey:
    """What a file holds. Keys of `roles` are indices of tensors; tensors that are not there are "other"."""

    optimizers: list[Optimizer] = field(default_factory=list)
    weights: list[ModelTensor] = field(default_factory=list)
    settings: list[DictNode] = field(default_factory=list)
    """The groups of optimizers whose states are elsewhere."""
    roles: dict[int, Role] = field(default_factory=dict)
    encoded: dict[int, StatePart] = field(default_factory=dict)
    """Parts of encoded states, by the index of their tensors."""
    nameless: list[TensorNode] = field(default_factory=list)
    """Running averages in a list."""


def parameter_name(name: str) -> str:
    """The name that the bare model gives a parameter, without what compile, DDP, FSDP or pickling add."""
    return bare_name(_PICKLED.sub("", shown(name)))


def survey(root: Any, limit: int) -> Survey:
    """Look through a description (of a torch file, or of a safetensors file as one dict)."""
    surveyed = Survey()
    bare = _is_state_dict(root)
    parents: dict[int, DictNode] = {}
    companions: set[int] = set()
    averages: set[int] = set()
    for path, node in walk(root, limit):
        if type(node) is TensorNode:
            if node.index not in companions:
                _tensor(surveyed, path, node, bare)
            continue
        if type(node) is not DictNode:
            if path.key in _MASTER_KEYS and not path.inside:
                path.inside = "master"
            elif id(node) in averages and not path.inside:
                path.inside = "list of averages"
            continue
        averages.update(averages_in(node))
        optimizer = _optimizer(path, node, parents)
        if optimizer is not None:
            path.inside = "optimizer"
            surveyed.optimizers.append(optimizer)
            _state_roles(surveyed, optimizer)
            continue
        surveyed.settings += _settings_alone(node)
        if not path.inside or path.inside == "state dict":
            path.inside = "averages" if id(node) in averages else _inside(path, node)
            if path.inside in _STATE_DICTS:
                companions.update(_companions(node))
            for _, child in node.items:
                if type(child) is DictNode:
                    parents.setdefault(id(child), node)
    return surveyed


def _inside(path: KeyPath, node: DictNode) -> str:
    key = path.key.lower() if type(path.key) is str and path.parent is not None else ""
    if key == "_buffers" or any(word in key for word in _OTHER_WORDS):
        return "other"
    return "state dict" if _is_state_dict(node) else ""


def _is_state_dict(node: Any) -> bool:
    """Mostly tensors under string keys, at least one of them with floating-point numbers and a dimension."""
    if type(node) is not DictNode or not node.items:
        return False
    tensors = [v for k, v in node.items if type(v) is TensorNode and type(k) is str]
    return len(tensors) * 5 >= len(node.items) * 4 and any(t.shape and _has_fractions(t.dtype) for t in tensors)


def _companions(state_dict: DictNode) -> Iterator[int]:
    """Indices of the tensors that only serve another one of their module: fp8 copies of it, scales of fp8 weights."""
    wide = set()
    narrow = set()
    for key, tensor in state_dict.strings().items():
        if type(tensor) is TensorNode and tensor.dtype.is_floating_point:
            module = key.rpartition(".")[0]
            if tensor.dtype.itemsize > 1:
                wide.add((module, tensor.shape))
            else:
                narrow.add(key)
    for key, tensor in state_dict.strings().items():
        if type(tensor) is not TensorNode or not tensor.dtype.is_floating_point:
            continue
        copy = tensor.dtype.itemsize == 1 and tensor.shape and (key.rpartition(".")[0], tensor.shape) in wide
        if copy or _SCALE.sub("", key) in narrow - {key}:
            yield tensor.index


def _tensor(surveyed: Survey, path: KeyPath, node: TensorNode, bare: bool) -> None:
    if path.inside in ("optimizer", "other") or node.index in surveyed.roles:
        return
    if path.inside == "master":
        surveyed.roles[node.index] = "master"
        return
    if path.inside == "list of averages":
        surveyed.nameless += [node] if _has_fractions(node.dtype) else []
        return
    leaf = path.key.rpartition(".")[2] if type(path.key) is str else ""
    if leaf in STATE_ROLES:
        if node.dtype.is_floating_point:
            surveyed.roles[node.index] = STATE_ROLES[leaf]
        return
    if leaf == "step" and math.prod(node.shape) == 1:
        surveyed.roles[node.index] = "step"
        return
    if (
        (path.inside not in _STATE_DICTS and not node.is_parameter)
        or not _has_fractions(node.dtype)
        or _is_buffer(path, node)
    ):
        return
    text = str(path)
    top = "" if bare or path.parent is None or path.parent.parent is None else spell(path.top)
    name = parameter_name(text[len(top) + 1 :] if top and text.startswith(top + ".") else text)
    surveyed.roles[node.index] = "weight"
    surveyed.weights.append(ModelTensor(name, top, node, path.inside == "averages" or is_average(text)))


def _has_fractions(dtype: DType) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_buffer(path: KeyPath, node: TensorNode) -> bool:
    if type(path.key) is not str or node.is_parameter:
        return False
    shape = node.shape
    causal_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] and path.key.endswith(".bias")
    return causal_mask or _BUFFER.search(path.key) is not None


def _optimizer(path: KeyPath, node: DictNode, parents: dict[int, DictNode]) -> Optimizer | None:
    """The optimizer that a dict with `state` and `param_groups` is, if its contents fit."""
    if len(node.items) > 64 or path.inside == "optimizer":
        return None
    state, groups = node.get("state"), node.get("param_groups")
    if type(state) is not DictNode or type(groups) not in (list, tuple):
        return None
    if groups and not any(type(g) is DictNode for g in groups):
        return None
    states: dict[Key, DictNode] = {}
    for position, (key, value) in enumerate(state.items):
        if type(value) is DictNode:
            number = _key(key)
            states[-1 - position if number is None else number] = unwrapped(
                value
            )  # no group refers to a negative number
    return Optimizer(path, [_group(g) for g in groups if type(g) is DictNode], states, parents.get(id(node)))


def _settings_alone(node: DictNode) -> list[DictNode]:
    """The groups of an optimizer that is saved without its states (Megatron's common.pt)."""
    if len(node.items) > 64 or node.get("state") is not None:
        return []
    groups = node.get("param_groups")
    return [g for g in groups if type(g) is DictNode] if type(groups) is list else []


def _key(value: Any) -> Key | None:
    if type(value) is str:
        return int(value) if _NUMBER.fullmatch(value) else value
    return value if type(value) is int and 0 <= value < 1 << 31 else None


def _group(node: DictNode) -> Group:
    params, names = node.get("params"), node.get("param_names")
    ids = [_key(p) for p in params] if type(params) in (list, tuple) else []
    if type(names) not in (list, tuple) or len(names) != len(ids):
        names = ids
    return Group(node, ids, [parameter_name(name) if type(name) is str else None for name in names])


def _state_roles(surveyed: Survey, optimizer: Optimizer) -> None:
    settings = {key: group.node.strings() for group in optimizer.groups for key in group.ids}
    for number, state in optimizer.states.items():
        surveyed.encoded.update((t.index, part) for t, part in encoded_parts(state, settings.get(number, {})))
        for key, value in state.items:
            if type(key) is not str or type(value) is not TensorNode:
                continue
            if key == "step" and math.prod(value.shape) == 1:
                surveyed.roles[value.index] = "step"
            elif key in STATE_ROLES and value.dtype.is_floating_point:
                surveyed.roles[value.index] = STATE_ROLES[key]


def encoded_parts(state: DictNode, settings: Mapping[str, Any]) -> list[tuple[TensorNode, StatePart]]:
    """The tensors of one parameter's state that are parts of encoded ones, ours or others'."""
    ours = [part for key, value in state.strings().items() for part in state_parts(key, value)]
    return ours + list(quantised_parts(state, settings))


def _param_shape(state: DictNode | None) -> tuple[int, ...] | None:
    if state is None:
        return None
    for key in STATE_ROLES:
        value = state.get(key)
        if type(value) is TensorNode:
            return value.shape
    encoded = {part.shape for _, part in encoded_parts(state, {})}
    if encoded:
        return encoded.pop() if len(encoded) == 1 else None
    others = {v.shape for k, v in state.items if type(v) is TensorNode and v.shape and k != "step"}
    return others.pop() if len(others) == 1 else None
