"""Gives every tensor its role and, where that is certain, the name of its parameter; collects what Adam needs.

Works on all files of a checkpoint at once, because an `optimizer.pt` gets its names from the `model.safetensors`
beside it. Names come from `param_names` or from name-keyed states where the file has them, otherwise from matching
shapes (match.py); a parameter whose weight is not certain stays anonymous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple

from statecodec.layouts.base import LogicalTensor
from statecodec.layouts.facts.averages import is_average
from statecodec.layouts.facts.file_roles import AdamNodes, FileRoles, MomentumNodes, WeightNode, Weights
from statecodec.layouts.facts.local_shards import with_local_shards
from statecodec.layouts.facts.names import name_all
from statecodec.layouts.facts.quantised import QuantisedNodes, is_shared
from statecodec.layouts.facts.scopes import Scopes
from statecodec.layouts.facts.survey import Optimizer, Survey, encoded_parts, parameter_name, survey
from statecodec.layouts.facts.updates import adam_nodes, common_settings, momentum_nodes, quantised_nodes
from statecodec.layouts.moments import Moments, Momentum, QuantisedMoments, QuantisedState
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.layouts.protocol import Located
from statecodec.roles import STATE_ROLES, Role, family

_WEIGHTS: Final[set[Role]] = {"weight", "master", "ema"}


class Named(NamedTuple):
    """All tensors, with roles and parameter names where facts give them; moments and weights that belong together."""

    tensors: list[LogicalTensor]
    moments: list[Moments]
    momenta: list[Momentum]
    quantised: list[QuantisedMoments]


def named(parts: Sequence[Located]) -> Named:
    """Name the tensors of all files of a checkpoint."""
    files = [[FileRoles(facts) for facts in located.facts] for located in parts]
    _assign([file for group in files for file in group])
    tensors: list[LogicalTensor] = []
    moments = [m for located in parts for m in located.moments]
    for located, group in zip(parts, files, strict=True):
        at = 0
        for file in group:
            described = located.tensors[at : at + len(file.facts.windows)]
            tensors += map(partial(_tensor, file), described, range(len(described)))
            at += len(described)
        tensors += located.tensors[at:]
    flat = [file for group in files for file in group]
    for file in flat:
        moments += filter(None, (_moments(file, adam) for adam in file.adam))
    momenta = [m for file in flat for m in filter(None, (_momentum(file, s) for s in file.single))]
    return Named(tensors, moments, momenta, [q for file in flat for q in _quantised_moments(file)])


def _tensor(file: FileRoles, tensor: LogicalTensor, number: int) -> LogicalTensor:
    """A file's tensor, with the role that all of its views have, and the name of its parameter."""
    nodes = file.facts.windows[number]
    if number not in file.facts.shared:
        file.tensors.update((node.index, tensor.name) for node in nodes)
    roles = {file.roles.get(node.index, "other") for node in nodes}
    names = [file.params[node.index] for node in nodes if node.index in file.params]
    role = roles.pop() if len(roles) == 1 else _role_of_several(roles)
    # Tied weights have several names, and the first is the one that Module.parameters() knows. Where windows differ
    # (FSDP1's flat parameters, and those in them), none is the name of the whole.
    tied = family(role) == "weight" and number not in file.facts.shared
    certain = names and (tied or len(set(names)) == 1)
    state = file.encoded.get(nodes[0].index) if len(nodes) == 1 else None
    return replace(tensor, role=role, param=names[0] if certain else None, state=state)


def _role_of_several(roles: set[Role]) -> Role:
    """The role of a tensor that is saved as several things: a weight that is its own master or average is a weight."""
    if not roles <= _WEIGHTS:
        return "other"
    return "weight" if "weight" in roles else "master"


def _moments(file: FileRoles, adam: AdamNodes) -> Moments | None:
    first, second = (file.tensors.get(node.index) for node in (adam.exp_avg, adam.exp_avg_sq))
    if first is None or second is None:
        return None
    weight = adam.weight[0].tensors.get(adam.weight[1].index) if adam.weight else None
    return Moments(**{**vars(adam), "exp_avg": first, "exp_avg_sq": second, "weight": weight})


def _quantised_moments(file: FileRoles) -> Iterator[QuantisedMoments]:
    for adam in file.quantised:
        first, second = (_quantised(file, nodes) for nodes in (adam.exp_avg, adam.exp_avg_sq))
        weight = adam.weight[0].tensors.get(adam.weight[1].index)
        if first is not None and second is not None and weight is not None:
            yield QuantisedMoments(**{**vars(adam), "exp_avg": first, "exp_avg_sq": second, "weight": weight})


def _quantised(file: FileRoles, nodes: QuantisedNodes) -> QuantisedState | None:
    """A state by the names of its tensors, if each is a tensor by itself."""
    codes, scales, *table = nodes.parts.values()
    names = [file.tensors.get(n.index) if type(n) is TensorNode else None for n in (codes, scales)]
    named_table = [file.tensors.get(n.index) if type(n) is TensorNode else None for n in table if n is not None]
    if names[0] is None or names[1] is None or None in named_table:
        return None
    return QuantisedState(nodes.package, nodes.bits, nodes.shape, names[0], names[1], *(named_table or [None]))


def _momentum(file: FileRoles, single: MomentumNodes) -> Momentum | None:
    momentum = file.tensors.get(single.momentum.index)
    weight = single.weight[0].tensors.get(single.weight[1].index)
    if momentum is None or weight is None:
        return None
    return Momentum(**{**vars(single), "momentum": momentum, "weight": weight})


def _assign(files: list[FileRoles]) -> None:
    """Fill in `roles`, `params` and `adam` of every file."""
    surveys = [survey(with_local_shards(file.facts.root), file.facts.limit) for file in files]
    _averages(files, surveys)
    for file, surveyed in zip(files, surveys, strict=True):
        file.roles, file.encoded = surveyed.roles, surveyed.encoded
        file.params.update({w.node.index: w.name for w in surveyed.weights})
    scopes = Scopes(files, surveys)
    for file, surveyed in zip(files, surveys, strict=True):
        if not surveyed.optimizers:
            continue
        names = name_all(surveyed.optimizers, scopes.candidates(file))
        weights = scopes.weights(file, surveyed)
        settings = [g for f, s in zip(files, surveys, strict=True) if f.folder == file.folder for g in s.settings]
        for optimizer, of_groups in zip(surveyed.optimizers, names, strict=True):
            _describe(file, optimizer, of_groups, weights, settings)


def _averages(files: list[FileRoles], surveys: list[Survey]) -> None:
    """Give weights that anything calls running averages the role `ema`, if there are others that they follow."""
    pairs = list(zip(files, surveys, strict=True))
    named = {id(surveyed) for f, surveyed in pairs if is_average(f.path) and not _tells_itself(surveyed)}
    weights = [(s, w.node, w.average or id(s) in named) for s in surveys for w in s.weights]
    followed = any(not average for _, _, average in weights)
    averages = [(surveyed, node) for surveyed, node, average in weights if average]
    for of_file, node in [*averages, *((surveyed, node) for _, surveyed in pairs for node in surveyed.nameless)]:
        of_file.roles[node.index] = "ema" if followed else "weight"


def _tells_itself(surveyed: Survey) -> bool:
    """Whether a file's own keys tell averages from weights, or its optimizer trains them, whatever its own name."""
    return bool(surveyed.optimizers or surveyed.nameless) or any(w.average for w in surveyed.weights)


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
    common = common_settings([group.node for group in optimizer.groups] or settings)
    for key, state in optimizer.of_no_group().items():
        name = parameter_name(key) if type(key) is str else None
        _describe_state(file, state, common, name, None if name is None else weights.get(name))


def _describe_state(
    file: FileRoles,
    state: DictNode,
    settings: dict[str, Any],
    name: str | None,
    weight: WeightNode | None,
) -> None:
    values = state.strings()
    if name is not None:
        file.params.update({v.index: name for v in values.values() if type(v) is TensorNode})
        file.params.update({t.index: name for t, part in encoded_parts(state, settings) if not is_shared(part)})
    for key, value in values.items():
        if type(value) is TensorNode and STATE_ROLES.get(key) == "master":
            weight = (file, value)  # what the update is added to; the model's own is a rounded copy
    adam = adam_nodes(file, values, settings, name, weight)
    if adam is not None:
        file.adam.append(adam)
    quantised = quantised_nodes(file, state, settings, name, weight)
    if quantised is not None:
        file.quantised.append(quantised)
    single = momentum_nodes(file, values, settings, weight)
    if single is not None:
        file.single.append(single)


def _masters(file: FileRoles, optimizer: Optimizer) -> dict[int, WeightNode]:
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
