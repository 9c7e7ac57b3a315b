"""Gives every tensor its role and, where that is certain, the name of its parameter; collects what Adam needs.

Works on all files of a checkpoint at once, because an `optimizer.pt` gets its names from the `model.safetensors`
beside it. Names come from `param_names` or from name-keyed states where the file has them, otherwise from matching
shapes (match.py); a parameter whose weight is not certain stays anonymous.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

import torch

from statecodec.layouts.facts.match import Shape, deal, deal_by_shape
from statecodec.layouts.facts.survey import Optimizer, Survey, Weight, is_average, parameter_name, survey
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.roles import Role

_MAX_ELSEWHERE: Final = 8
_STRANGERS: Final = 4  # parameters that fit, at least, for each one that does not
_SCALARS: Final[dict[torch.dtype, str]] = {
    torch.float32: "<f", torch.float64: "<d", torch.float16: "<e",
    torch.int64: "<q", torch.int32: "<i", torch.int16: "<h", torch.uint8: "<B", torch.int8: "<b",
}  # fmt: skip


@dataclass(frozen=True)
class Adam:
    """Moments, still in terms of tensor nodes of one file."""

    param: str | None
    exp_avg: TensorNode
    exp_avg_sq: TensorNode
    weight: TensorNode | None
    beta1: float
    beta2: float
    eps: float
    lr: float | None
    weight_decay: float | None
    step: float | None


@dataclass
class FileRoles:
    """One file's description going in (the first four fields), its roles coming out."""

    path: str
    root: Any
    ordered: bool
    """Its tensors stand in the model's order (torch files; safetensors are sorted by name)."""
    scalars: dict[int, bytes]
    """Tensor's index -> bytes, of the file's one-element tensors."""
    roles: dict[int, Role] = field(default_factory=dict)
    """Tensor's index -> role; absent means "other"."""
    params: dict[int, str] = field(default_factory=dict)
    """Tensor's index -> parameter name."""
    adam: list[Adam] = field(default_factory=list)


@dataclass
class _Candidate:
    """The weights that an optimizer may be about; ties counted once."""

    weights: list[Weight]
    ordered: bool

    def names(self) -> list[str]:
        return [w.name for w in self.weights]

    def shapes(self) -> list[Shape]:
        return [w.node.shape for w in self.weights]


def assign(files: list[FileRoles]) -> None:
    """Fill in `roles`, `params` and `adam` of every file."""
    surveys = [survey(file.root) for file in files]
    _averages(files, surveys)
    own = [_candidates(s.weights, f.ordered) for f, s in zip(files, surveys, strict=True)]
    folders = _folders(files, own)
    for file, found, candidates in zip(files, surveys, own, strict=True):
        file.roles = found.roles
        file.params.update({w.node.index: w.name for w in found.weights})
        if not found.optimizers:
            continue
        beside = folders[str(PurePosixPath(file.path).parent)]
        elsewhere = [c for folder in folders.values() if folder is not beside for c in folder]
        if len(elsewhere) > _MAX_ELSEWHERE:  # many checkpoints side by side, none of which need be this one's
            elsewhere = []
        names = _name_all(found.optimizers, [candidates, beside, elsewhere])
        local = _by_name([w for w in found.weights if found.roles[w.node.index] == "weight"])
        for optimizer, named in zip(found.optimizers, names, strict=True):
            _describe(file, optimizer, named, local)


def _averages(files: list[FileRoles], surveys: list[Survey]) -> None:
    """Weights that their path or file calls a running average are that, if there are others that they follow."""
    weights = [(s, w, w.average or is_average(f.path)) for f, s in zip(files, surveys, strict=True) for w in s.weights]
    if any(not average for _, _, average in weights):
        for found, weight, average in weights:
            if average:
                found.roles[weight.node.index] = "ema"


def _by_name(weights: list[Weight]) -> dict[str, TensorNode]:
    found: dict[str, TensorNode] = {}
    for weight in weights:
        found.setdefault(weight.name, weight.node)
    return found


def _candidates(weights: list[Weight], ordered: bool) -> list[_Candidate]:
    """The models of one file. Tied weights count once, under their first name, as in Module.parameters()."""
    models: dict[str, list[Weight]] = defaultdict(list)
    seen: set[tuple[str, str, int]] = set()
    for weight in weights:
        tie = (weight.top, weight.node.storage.key, weight.node.offset)
        if math.prod(weight.node.shape) and tie not in seen:
            seen.add(tie)
            models[weight.top].append(weight)
    return [_Candidate(model, ordered) for model in models.values()]


def _folders(files: list[FileRoles], own: list[list[_Candidate]]) -> dict[str, list[_Candidate]]:
    """Per folder: each file's models, and all files' weights together (a model in several shards)."""
    folders: dict[str, list[_Candidate]] = defaultdict(list)
    for ordered in (True, False):
        shards: dict[str, list[Weight]] = defaultdict(list)
        for file, candidates in zip(files, own, strict=True):
            folder = str(PurePosixPath(file.path).parent)
            folders[folder] += []
            if file.ordered is ordered and candidates:
                folders[folder] += candidates
                shards[folder] += [w for c in candidates for w in c.weights]
        for folder, weights in shards.items():
            if len(weights) > max(len(c.weights) for c in folders[folder]):
                folders[folder].append(_Candidate(weights, ordered))
    return folders


def _name_all(optimizers: list[Optimizer], scopes: list[list[_Candidate]]) -> list[list[list[str | None]]]:
    """For each optimizer, for each group, the parameters' names; None where they are not certain."""
    named: list[list[list[str | None]] | None] = [_given_names(o) for o in optimizers]
    for scope in scopes:
        open_ones = [i for i, n in enumerate(named) if n is None]
        for i in open_ones:
            named[i] = _agreed([_match_ordered(c, [optimizers[i]], exact=True) for c in scope])
        open_ones = [i for i in open_ones if named[i] is None]
        together = _agreed([_match_ordered(c, [optimizers[i] for i in open_ones], exact=True) for c in scope])
        if together is not None:
            for i in open_ones:
                named[i], together = together[: len(optimizers[i].groups)], together[len(optimizers[i].groups) :]
            continue
        for i in open_ones:
            named[i] = _agreed([_match_ordered(c, [optimizers[i]], exact=False) for c in scope])
    for scope in scopes:
        for i, optimizer in enumerate(optimizers):
            if named[i] is None:
                named[i] = _agreed([_match_shapes(c, optimizer) for c in scope])
    return [n or [[None] * len(g.ids) for g in o.groups] for n, o in zip(named, optimizers, strict=True)]


def _given_names(optimizer: Optimizer) -> list[list[str | None]] | None:
    return [g.names for g in optimizer.groups] if any(any(g.names) for g in optimizer.groups) else None


def _agreed(answers: list[list[list[str | None]] | None]) -> list[list[str | None]] | None:
    """The one answer that all candidates that have one give (a model and its EMA agree)."""
    given = [a for a in answers if a is not None]
    return given[0] if given and all(a == given[0] for a in given) else None


def _match_ordered(candidate: _Candidate, optimizers: list[Optimizer], *, exact: bool) -> list[list[str | None]] | None:
    groups = [shapes for o in optimizers for shapes in o.shapes()]
    total = sum(len(g) for g in groups)
    if not candidate.ordered or not total or (exact and total != len(candidate.weights)):
        return None
    if all(shape is None for group in groups for shape in group):
        return None
    names = candidate.names()
    dealt = deal(candidate.shapes(), groups)
    if dealt is not None:
        return [[names[w] for w in group] for group in dealt]
    return None if exact else _without_strangers(candidate, groups)


def _without_strangers(candidate: _Candidate, groups: list[list[Shape | None]]) -> list[list[str | None]] | None:
    """The same without the few parameters that have no state, or a shape that no weight has: they stay anonymous."""
    known = set(candidate.shapes())
    fitting = [[i for i, shape in enumerate(group) if shape in known] for group in groups]
    count, total = sum(map(len, fitting)), sum(map(len, groups))
    if count == total or (total - count) * _STRANGERS > count:
        return None
    dealt = deal(candidate.shapes(), [[g[i] for i in kept] for g, kept in zip(groups, fitting, strict=True)])
    if dealt is None:
        return None
    found: list[list[str | None]] = [[None] * len(group) for group in groups]
    for names, kept, weights in zip(found, fitting, dealt, strict=True):
        for i, w in zip(kept, weights, strict=True):
            names[i] = candidate.weights[w].name
    return found


def _match_shapes(candidate: _Candidate, optimizer: Optimizer) -> list[list[str | None]] | None:
    groups = optimizer.shapes()
    if sum(len(g) for g in groups) > len(candidate.weights):
        return None
    pairs = list(zip(candidate.names(), candidate.shapes(), strict=True))
    # Where the order is known and did not fit, it cannot be leant on.
    found = deal_by_shape(pairs, groups, layers=not candidate.ordered)
    if not found:
        return None
    return [
        [pairs[found[g, i]][0] if (g, i) in found else None for i in range(len(group))]
        for g, group in enumerate(groups)
    ]


def _describe(
    file: FileRoles, optimizer: Optimizer, names: list[list[str | None]], weights: dict[str, TensorNode]
) -> None:
    """Name one optimizer's state tensors and collect its Adam moments."""
    masters = _masters(optimizer)
    position = 0
    for group, group_names in zip(optimizer.groups, names, strict=True):
        for key, name in zip(group.ids, group_names, strict=True):
            state = optimizer.state(key)
            weight = weights.get(name) if name is not None else masters.get(position)
            position += 1
            if state is not None:
                _describe_state(file, state, group.node.strings(), name, weight)
    common = _common([group.node for group in optimizer.groups])
    for key, state in optimizer.of_no_group().items():
        name = parameter_name(key) if type(key) is str else None
        _describe_state(file, state, common, name, None if name is None else weights.get(name))


def _describe_state(
    file: FileRoles, state: DictNode, settings: dict[str, Any], name: str | None, weight: TensorNode | None
) -> None:
    values = state.strings()
    if name is not None:
        file.params.update({v.index: name for v in values.values() if type(v) is TensorNode})
    adam = _adam(file, values, settings, name, weight)
    if adam is not None:
        file.adam.append(adam)


def _common(groups: list[DictNode]) -> dict[str, Any]:
    """The settings that all groups share."""
    first = groups[0].strings() if groups else {}
    plain = {k: v for k, v in first.items() if type(v) in (int, float, tuple)}
    return {k: v for k, v in plain.items() if all(_same(group.get(k), v) for group in groups)}


def _same(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=False) if type(a) is type(b) is tuple and len(a) == len(b) else [(a, b)]
    return all(type(x) is type(y) and type(x) in (int, float) and x == y for x, y in pairs)


def _masters(optimizer: Optimizer) -> dict[int, TensorNode]:
    """DeepSpeed ZeRO-1/2: parameter g of the inner optimizer is flat fp32 partition g, by construction."""
    flat = optimizer.parent.get("single_partition_of_fp32_groups") if optimizer.parent is not None else None
    if type(flat) is not list or len(flat) != sum(len(g.ids) for g in optimizer.groups):
        return {}
    return {i: node for i, node in enumerate(flat) if type(node) is TensorNode}


def _adam(
    file: FileRoles, state: dict[str, Any], group: dict[str, Any], name: str | None, weight: TensorNode | None
) -> Adam | None:
    m, v = state.get("exp_avg"), state.get("exp_avg_sq")
    if type(m) is not TensorNode or type(v) is not TensorNode or (m.shape, m.stride) != (v.shape, v.stride):
        return None
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return None
    beta1, beta2, eps = (_number(file, value) for value in (*betas, group.get("eps")))
    if beta1 is None or beta2 is None or eps is None or not m.dtype.is_floating_point or not v.dtype.is_floating_point:
        return None
    if weight is not None and (weight.shape, weight.stride) != (m.shape, m.stride):
        weight = None
    lr, decay = _number(file, group.get("lr")), _number(file, group.get("weight_decay"))
    step = _number(file, state.get("step", group.get("step")))
    return Adam(name, m, v, weight, beta1, beta2, eps, lr, decay, step)


def _number(file: FileRoles, value: Any) -> float | None:
    """A finite setting: a plain number, or a one-element tensor read from the file."""
    if type(value) is TensorNode:
        data = file.scalars.get(value.index)
        if data is None or value.bits:
            return None
        if value.dtype is torch.bfloat16:
            value = struct.unpack("<f", b"\0\0" + data)[0]
        elif value.dtype in _SCALARS:
            value = struct.unpack(_SCALARS[value.dtype], data)[0]
    if type(value) is int and value.bit_length() > 1000:
        return None
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None
