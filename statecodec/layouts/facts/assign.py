"""Gives every tensor its role and, where that is certain, the name of its parameter; collects what Adam needs.

Works on all files of a checkpoint at once, because an `optimizer.pt` gets its names from the `model.safetensors`
beside it. Names come from `param_names` or from name-keyed states where the file has them, otherwise from matching
shapes (match.py); a parameter whose weight is not certain stays anonymous.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Final

from statecodec.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, INT64, UINT8, DType
from statecodec.layouts.base import LogicalTensor, Moments, Momentum, StatePart
from statecodec.layouts.facts.names import Candidate, models, name_all
from statecodec.layouts.facts.quantised import is_shared
from statecodec.layouts.facts.survey import (
    ModelTensor,
    Optimizer,
    Survey,
    encoded_parts,
    is_average,
    parameter_name,
    survey,
)
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.layouts.protocol import Facts, Located
from statecodec.roles import STATE_ROLES, Role, family

_MAX_ELSEWHERE: Final = 8
_SCALARS: Final[dict[DType, str]] = {
    FLOAT32: "<f", FLOAT64: "<d", FLOAT16: "<e",
    INT64: "<q", INT32: "<i", INT16: "<h", UINT8: "<B", INT8: "<b",
}  # fmt: skip


@dataclass(frozen=True)
class AdamNodes:
    """Moments, still in terms of tensor nodes: the states are of one file, the weight may be of another."""

    param: str | None
    exp_avg: TensorNode
    exp_avg_sq: TensorNode
    weight: tuple[FileRoles, TensorNode] | None
    beta1: float
    beta2: float
    eps: float
    lr: float | None
    weight_decay: float | None
    step: float | None


@dataclass(frozen=True)
class MomentumNodes:
    """A momentum without a second moment, and its weight, as `AdamNodes` has them."""

    momentum: TensorNode
    weight: tuple[FileRoles, TensorNode]
    lr: float | None
    update: float | None
    orthogonal: bool


@dataclass
class FileRoles:
    """What is found out about one file's tensors, by their index."""

    facts: Facts
    roles: dict[int, Role] = field(default_factory=dict)
    """Absent means "other"."""
    params: dict[int, str] = field(default_factory=dict)
    """Names of parameters."""
    adam: list[AdamNodes] = field(default_factory=list)
    single: list[MomentumNodes] = field(default_factory=list)
    tensors: dict[int, str] = field(default_factory=dict)
    """Names of the logical tensors that are the node's, wholly and alone."""
    encoded: dict[int, StatePart] = field(default_factory=dict)
    """Parts of encoded states."""

    @property
    def path(self) -> str:
        return self.facts.path

    @property
    def folder(self) -> str:
        return str(PurePosixPath(self.path).parent)


Weights = dict[str, tuple[FileRoles, TensorNode]]
"""By name: the tensor, and the file that it is in."""


def named(found: Sequence[Located]) -> tuple[list[LogicalTensor], list[Moments], list[Momentum]]:
    """All tensors, with roles and parameter names where facts tell them; moments and weights that belong together."""
    files = [[FileRoles(facts) for facts in located.facts] for located in found]
    _assign([file for group in files for file in group])
    tensors: list[LogicalTensor] = []
    moments = [m for located in found for m in located.moments]
    for located, group in zip(found, files, strict=True):
        at = 0
        for file in group:
            own = located.tensors[at : at + len(file.facts.windows)]
            tensors += map(partial(_tensor, file), own, range(len(own)))
            at += len(own)
        tensors += located.tensors[at:]
    flat = [file for group in files for file in group]
    for file in flat:
        moments += filter(None, (_moments(file, adam) for adam in file.adam))
    return tensors, moments, [m for file in flat for m in filter(None, (_momentum(file, s) for s in file.single))]


def _tensor(file: FileRoles, tensor: LogicalTensor, number: int) -> LogicalTensor:
    """A file's tensor, with the role that all of its views have, and the name of its parameter."""
    nodes = file.facts.windows[number]
    if number not in file.facts.shared:
        file.tensors.update((node.index, tensor.name) for node in nodes)
    roles = {file.roles.get(node.index, "other") for node in nodes}
    names = [file.params[node.index] for node in nodes if node.index in file.params]
    role = roles.pop() if len(roles) == 1 else "other"
    # Tied weights have several names, and the first is the one that Module.parameters() knows.
    certain = names and (family(role) == "weight" or len(set(names)) == 1)
    state = file.encoded.get(nodes[0].index) if len(nodes) == 1 else None
    return replace(tensor, role=role, param=names[0] if certain else None, state=state)


def _moments(file: FileRoles, adam: AdamNodes) -> Moments | None:
    first, second = (file.tensors.get(node.index) for node in (adam.exp_avg, adam.exp_avg_sq))
    if first is None or second is None:
        return None
    weight = adam.weight[0].tensors.get(adam.weight[1].index) if adam.weight else None
    return Moments(
        adam.param, first, second, weight, adam.beta1, adam.beta2, adam.eps, adam.lr, adam.weight_decay, adam.step
    )


def _momentum(file: FileRoles, single: MomentumNodes) -> Momentum | None:
    state = file.tensors.get(single.momentum.index)
    weight = single.weight[0].tensors.get(single.weight[1].index)
    if state is None or weight is None:
        return None
    return Momentum(state, weight, single.lr, single.update, single.orthogonal)


def _assign(files: list[FileRoles]) -> None:
    """Fill in `roles`, `params` and `adam` of every file."""
    surveys = [survey(file.facts.root, file.facts.limit) for file in files]
    _averages(files, surveys)
    own = [models(s.weights, f.facts.ordered) for f, s in zip(files, surveys, strict=True)]
    folders = _folders(files, own)
    for file, found in zip(files, surveys, strict=True):
        file.roles, file.encoded = found.roles, found.encoded
        file.params.update({w.node.index: w.name for w in found.weights})
    by_folder = _weights_by_folder(files, surveys)
    for file, found, candidates in zip(files, surveys, own, strict=True):
        if not found.optimizers:
            continue
        beside = folders[file.folder]
        elsewhere = [c for folder in folders.values() if folder is not beside for c in folder]
        if len(elsewhere) > _MAX_ELSEWHERE:  # many checkpoints side by side, none of which need be this one's
            elsewhere = []
        names = name_all(found.optimizers, [candidates, beside, elsewhere])
        weights = by_folder[file.folder] | _by_name(file, found.weights)
        settings = [g for f, s in zip(files, surveys, strict=True) if f.folder == file.folder for g in s.settings]
        for optimizer, of_groups in zip(found.optimizers, names, strict=True):
            _describe(file, optimizer, of_groups, weights, settings)


def _averages(files: list[FileRoles], surveys: list[Survey]) -> None:
    """Weights that their path or file calls a running average are that, if there are others that they follow."""
    weights = [(s, w, w.average or is_average(f.path)) for f, s in zip(files, surveys, strict=True) for w in s.weights]
    if any(not average for _, _, average in weights):
        for found, weight, average in weights:
            if average:
                found.roles[weight.node.index] = "ema"


def _by_name(file: FileRoles, weights: list[ModelTensor]) -> Weights:
    """A file's weights, no copies of them; of several models the first."""
    found: Weights = {}
    for weight in weights:
        if file.roles[weight.node.index] == "weight":
            found.setdefault(weight.name, (file, weight.node))
    return found


def _weights_by_folder(files: list[FileRoles], surveys: list[Survey]) -> dict[str, Weights]:
    """For each folder the weights in its files, whose names only one of them has."""
    found: dict[str, Weights] = defaultdict(dict)
    twice: dict[str, set[str]] = defaultdict(set)
    for file, seen in zip(files, surveys, strict=True):
        weights = _by_name(file, seen.weights)
        twice[file.folder] |= weights.keys() & found[file.folder].keys()
        found[file.folder].update(weights)
    return defaultdict(dict, {
        folder: {name: w for name, w in weights.items() if name not in twice[folder]}
        for folder, weights in found.items()
    })  # fmt: skip


def _folders(files: list[FileRoles], own: list[list[Candidate]]) -> dict[str, list[Candidate]]:
    """Per folder: each file's models, and all files' weights together (a model in several shards)."""
    folders: dict[str, list[Candidate]] = defaultdict(list)
    for ordered in (True, False):
        shards: dict[str, list[ModelTensor]] = defaultdict(list)
        for file, candidates in zip(files, own, strict=True):
            folder = file.folder
            folders[folder] += []
            if file.facts.ordered is ordered and candidates:
                folders[folder] += candidates
                shards[folder] += [w for c in candidates for w in c.weights]
        for folder, weights in shards.items():
            if len(weights) > max(len(c.weights) for c in folders[folder]):
                folders[folder].append(Candidate(weights, ordered))
    return folders


def _describe(
    file: FileRoles, optimizer: Optimizer, names: list[list[str | None]], weights: Weights, settings: list[DictNode]
) -> None:
    """Name one optimizer's state tensors and collect its Adam moments.

    `settings`: of optimizers of the folder that are saved without their states; they count where it has none itself.
    """
    masters = _masters(file, optimizer)
    position = 0
    for group, group_names in zip(optimizer.groups, names, strict=True):
        for key, name in zip(group.ids, group_names, strict=True):
            state = optimizer.state(key)
            weight, master = weights.get(name) if name is not None else None, masters.get(position)
            if master is not None and (weight is None or weight[1].shape == master[1].shape):
                weight = master  # what the update is added to; the model's own is a rounded copy
                file.params.update({} if name is None else {master[1].index: name})
            position += 1
            if state is not None:
                _describe_state(file, state, group.node.strings(), name, weight)
    common = _common([group.node for group in optimizer.groups] or settings)
    for key, state in optimizer.of_no_group().items():
        name = parameter_name(key) if type(key) is str else None
        _describe_state(file, state, common, name, None if name is None else weights.get(name))


def _describe_state(
    file: FileRoles, state: DictNode, settings: dict[str, Any], name: str | None,
    weight: tuple[FileRoles, TensorNode] | None,
) -> None:  # fmt: skip
    values = state.strings()
    if name is not None:
        file.params.update({v.index: name for v in values.values() if type(v) is TensorNode})
        file.params.update({t.index: name for t, part in encoded_parts(state, settings) if not is_shared(part)})
    for key, value in values.items():
        if type(value) is TensorNode and STATE_ROLES.get(key) == "master":
            weight = (file, value)  # what the update is added to; the model's own is a rounded copy
    adam = _adam(file, values, settings, name, weight)
    if adam is not None:
        file.adam.append(adam)
    single = _single(file, values, settings, weight)
    if single is not None:
        file.single.append(single)


def _common(groups: list[DictNode]) -> dict[str, Any]:
    """The settings that all groups share."""
    first = groups[0].strings() if groups else {}
    plain = {k: v for k, v in first.items() if type(v) in (int, float, tuple)}
    return {k: v for k, v in plain.items() if all(_same(group.get(k), v) for group in groups)}


def _same(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=False) if type(a) is type(b) is tuple and len(a) == len(b) else [(a, b)]
    return all(type(x) is type(y) and type(x) in (int, float) and x == y for x, y in pairs)


def _masters(file: FileRoles, optimizer: Optimizer) -> dict[int, tuple[FileRoles, TensorNode]]:
    """By position among the parameters, where masters stand beside the optimizer.

    DeepSpeed ZeRO-1/2: parameter g of the inner optimizer is flat fp32 partition g, by construction. Megatron: a list
    for each group, in the order of its parameters, if all of them have one.
    """
    flat = optimizer.parent.get("single_partition_of_fp32_groups") if optimizer.parent is not None else None
    lists = optimizer.parent.get("fp32_from_fp16_params") if optimizer.parent is not None else None
    if type(lists) is list and all(type(of_group) is list for of_group in lists):
        sizes = [len(group.ids) for group in optimizer.groups]
        flat = [master for of_group in lists for master in of_group] if list(map(len, lists)) == sizes else None
    if type(flat) is not list or len(flat) != sum(len(g.ids) for g in optimizer.groups):
        return {}
    return {i: (file, node) for i, node in enumerate(flat) if type(node) is TensorNode}


def _adam(
    file: FileRoles, state: dict[str, Any], group: dict[str, Any], name: str | None,
    weight: tuple[FileRoles, TensorNode] | None,
) -> AdamNodes | None:  # fmt: skip
    m, v = state.get("exp_avg"), state.get("exp_avg_sq")
    if type(m) is not TensorNode or type(v) is not TensorNode or (m.shape, m.stride) != (v.shape, v.stride):
        return None
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return None
    beta1, beta2, eps = (_number(file, value) for value in (*betas, group.get("eps")))
    if beta1 is None or beta2 is None or eps is None or not m.dtype.is_floating_point or not v.dtype.is_floating_point:
        return None
    if weight is not None and (weight[1].shape, weight[1].stride) != (m.shape, m.stride):
        weight = None
    lr, decay = _number(file, group.get("lr")), _number(file, group.get("weight_decay"))
    step = _number(file, state.get("step", group.get("step")))
    return AdamNodes(name, m, v, weight, beta1, beta2, eps, lr, decay, step)


def _single(
    file: FileRoles, state: dict[str, Any], group: dict[str, Any], weight: tuple[FileRoles, TensorNode] | None
) -> MomentumNodes | None:
    """SGD's and Muon's `momentum_buffer`, Lion's `exp_avg`: all of the state, so that a step follows from it alone."""
    keys = [key for key, value in state.items() if type(value) is TensorNode and key != "step"]
    if len(keys) != 1 or keys[0] not in ("momentum_buffer", "exp_avg") or weight is None:
        return None
    m, lr = state[keys[0]], _number(file, group.get("lr"))
    if (weight[1].shape, weight[1].stride) != (m.shape, m.stride) or not m.dtype.is_floating_point:
        return None
    if keys[0] == "exp_avg":
        return MomentumNodes(m, weight, lr, 1.0, False)  # Lion's update is a sign
    if "ns_steps" not in group or not m.shape:
        return MomentumNodes(m, weight, lr, None, False)
    # Muon's orthogonal update, scaled for its shape, has an rms of 1 / sqrt(columns), or one like Adam's.
    like_adam = "match_rms_adamw" in (group.get("adjust_lr_fn"), group.get("adjust"))
    columns = max(math.prod(m.shape[1:]), 1)
    return MomentumNodes(m, weight, lr, 0.2 if like_adam else 1 / math.sqrt(columns), True)


def _number(file: FileRoles, value: Any) -> float | None:
    """A finite setting: a plain number, or a one-element tensor read from the file."""
    if type(value) is TensorNode:
        data = file.facts.scalars.get(value.index)
        if data is None or value.bits:
            return None
        if value.dtype is BFLOAT16:
            value = struct.unpack("<f", b"\0\0" + data)[0]
        elif value.dtype in _SCALARS:
            value = struct.unpack(_SCALARS[value.dtype], data)[0]
    if type(value) is int and value.bit_length() > 1000:
        return None
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None
