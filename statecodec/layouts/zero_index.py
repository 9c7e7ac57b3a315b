"""Reads what the files of a ZeRO checkpoint say about each other, and cuts their flat tensors at the parameters' ends.

Every number is compared with the others: names and shapes with the sizes of the flat tensors, those with paddings and
`param_slice_mappings`, the count of partitions with the files that are there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from statecodec.errors import MalformedCheckpoint
from statecodec.layouts.base import Run
from statecodec.layouts.flat import FlatFile, Fragment, Param, PartWindow
from statecodec.layouts.graph import contiguous
from statecodec.layouts.listing import ListedFile
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.layouts.zero_partitions import PartitionedGroup, PartitionedParams, read_params
from statecodec.layouts.zero_shards import Partition, UnknownForm, read_shard
from statecodec.names import shown
from statecodec.roles import STATE_ROLES

MASTER: Final = "fp32_param"
"""What the masters are called beside the optimizer's own states."""
WEIGHTS: Final = ("module", "frozen_param_fragments")


@dataclass
class ZeroIndex:
    """What one model-parallel rank's files hold."""

    stage: int
    ranks: int
    shards: list[FlatFile]
    params: dict[str, Param]
    """The trained ones, then the frozen ones."""
    settings: list[tuple[list[str], DictNode | None, Any]]
    """Of each group the names of its parameters, the optimizer's settings for them, and the step of rank 0."""
    parts: dict[tuple[str, str], list[PartWindow]] = field(default_factory=lambda: defaultdict(list))
    """By kind (of WEIGHTS, MASTER, or a state's key) and parameter."""
    steps: list[TensorNode] = field(default_factory=list)
    """Steps of all ranks."""


def read_index(models: Mapping[int, ListedFile], optimizers: Mapping[int, ListedFile], folder: str) -> ZeroIndex:
    """Read one model-parallel rank's files, by data-parallel rank. Raises LayoutError, and UnknownForm."""
    if not models or not optimizers:
        raise MalformedCheckpoint(f"{folder}: no ..._{'optim' if models else 'model'}_states.pt beside the other files")
    partitions = [Partition(read_shard(optimizers[rank])) for rank in sorted(optimizers)]
    described = [read_shard(models[rank]) for rank in sorted(models)]
    first = partitions[0]
    stage = first.stage
    _check_count(optimizers, _count(first), "optim_states", folder)
    _check_count(models, len(partitions) if stage == 3 else 1, "model_states", folder)
    groups = _groups(described)
    frozen = read_params(described[0].root.get("frozen_param_shapes"), described[0].path)
    params = {p.name: p for group in (*groups, frozen) for p in group}
    if len(params) != sum(map(len, groups)) + len(frozen):
        raise MalformedCheckpoint(f"{described[0].path}: names a parameter twice")
    for partition in partitions:
        if (partition.stage, len(partition.masters)) != (stage, len(groups)):
            raise MalformedCheckpoint(
                f"{partition.path}: ZeRO-{partition.stage} with {len(partition.masters)} groups; "
                f"the other files say ZeRO-{stage} with {len(groups)}"
            )
    settings = [
        ([p.name for p in group], first.settings.get(i), first.states.get(i, DictNode()).get("step"))
        for i, group in enumerate(groups)
    ]
    index = ZeroIndex(stage, len(partitions), [*described, *(p.shard for p in partitions)], params, settings)
    for number, group in enumerate(groups):
        plan = PartitionedParams(group, len(partitions)) if stage == 3 else _flat(partitions, number, group)
        for rank, partition in enumerate(partitions):
            _cut_group(index, partition, rank, number, plan)
    if stage == 3:
        _cut_frozen(index, described, frozen)
    else:
        _cut_weights(index, described[0])
    return index


# ---- what there should be


def _groups(described: Sequence[FlatFile]) -> list[list[Param]]:
    """Names and shapes of the parameters of each group, the same in every file."""
    agreed: list[list[Param]] | None = None
    for shard in described:
        shapes = shard.root.get("param_shapes")
        if type(shapes) is not list:
            raise UnknownForm
        groups = [read_params(group, f"{shard.path}, param_shapes") for group in shapes]
        if agreed is not None and agreed != groups:
            raise MalformedCheckpoint(f"{shard.path}: param_shapes are not those of {described[0].path}")
        agreed = groups
    return agreed or []


def _count(partition: Partition) -> int:
    stated = partition.partitions
    if type(stated) is list and stated and all(type(n) is int and n == stated[0] for n in stated):
        return int(stated[0])
    if type(stated) is not int:  # it is none where experts are cut differently
        raise UnknownForm
    return stated


def _check_count(files: Mapping[int, ListedFile], count: int, kind: str, folder: str) -> None:
    missing = next((rank for rank in range(min(count, len(files) + 1)) if rank not in files), None)
    if missing is not None:
        which = f"zero_pp_rank_{missing}_..." if count > 1 else "..."
        raise MalformedCheckpoint(f"{folder}: {which}_{kind}.pt is missing, one of {count}")
    if len(files) != count:
        extra = files[max(files)].path
        raise MalformedCheckpoint(f"{extra}: one of {len(files)}; the others say {count}. Is it another checkpoint's?")


def _flat(partitions: Sequence[Partition], number: int, group: Sequence[Param]) -> PartitionedGroup:
    """How a group of stage 1 or 2 is cut."""
    total, padding = sum(p.numel for p in group), sum(partition.padding(number) for partition in partitions)
    size, rest = divmod(total + padding, len(partitions))
    if rest:
        raise MalformedCheckpoint(
            f"{partitions[0].path}: {total} elements of group {number} and {padding} of padding do not make "
            f"{len(partitions)} partitions"
        )
    return PartitionedGroup(group, size)


# ---- cutting


def _cut_group(
    index: ZeroIndex, partition: Partition, rank: int, number: int, plan: PartitionedGroup | PartitionedParams
) -> None:
    """Cut one rank's master and states of one group."""
    fragments = list(plan.fragments(rank))
    _check_mapping(partition, number, fragments)
    state = partition.states.get(number, DictNode())
    flat: list[tuple[str, Any, Any, Any]] = [(MASTER, partition.masters, number, partition.masters[number])]
    flat += [(key, state, key, value) for key, value in state.items if type(key) is str]
    for kind, holder, key, node in flat:
        if type(node) is TensorNode and kind == "step":
            index.steps.append(node)
        if type(node) is not TensorNode or (kind != MASTER and (not node.shape or kind not in STATE_ROLES)):
            if kind == MASTER:
                raise MalformedCheckpoint(f"{partition.path}: the master of group {number} is no tensor")
            continue
        _check_size(node, plan, rank, f"{partition.path}: {kind} of group {number}")
        for fragment, part in zip(fragments, partition.shard.cut(holder, key, node, fragments), strict=True):
            index.parts[kind, fragment.param.name].append(part)


def _check_size(node: TensorNode, plan: PartitionedGroup | PartitionedParams, rank: int, where: str) -> None:
    if node.stride != (1,) or node.shape[0] not in plan.sizes(rank):
        raise MalformedCheckpoint(
            f"{where} has the shape {list(node.shape)[:8]}; {plan.sizes(rank)[1]} elements, with padding, were expected"
        )


def _check_mapping(partition: Partition, number: int, fragments: Sequence[Fragment]) -> None:
    """Compare fragments with the file's own list of them, if it has one."""
    stated = partition.mapping(number)
    computed = {f.param.name: (f.at, f.run.stop - f.run.start) for f in fragments}
    if stated is not None and stated != computed:
        wrong = next(name for name in (*computed, *stated) if computed.get(name) != stated.get(name))
        raise MalformedCheckpoint(
            f"{partition.path}: param_slice_mappings and param_shapes do not agree where {shown(wrong)!r:.80} lies"
        )


def _cut_weights(index: ZeroIndex, shard: FlatFile) -> None:
    """Cut the weights of stages 1 and 2 where their masters are cut. Names of one tied weight are cut alike."""
    kind, module = WEIGHTS[0], shard.root.get(WEIGHTS[0])
    if type(module) is not DictNode:
        raise UnknownForm
    buffers = shard.root.get("buffer_names")
    if type(buffers) is not list:
        raise UnknownForm
    listed = {*index.params, *(name for name in buffers if type(name) is str)}
    named = [(k, v) for k, v in module.items if type(k) is str and type(v) is TensorNode]
    tied: dict[tuple[Any, ...], Param] = {}
    # Stage 1 does not list the frozen ones; of several names of one weight the one that has a master counts.
    for name, node in sorted(named, key=lambda pair: pair[0] not in listed):
        if name not in listed:
            index.params[name] = Param(name, node.shape, math.prod(node.shape))
        param = index.params.get(name)
        if param is not None and node.shape != param.shape:
            raise MalformedCheckpoint(f"{shard.path}: {shown(name)!r:.80} has another shape than in param_shapes")
        if param is not None and param.numel and node.stride == contiguous(node.shape):
            tied.setdefault(_window(node), param)
    for name, node in named:
        param = tied.get(_window(node))
        if param is None:
            continue
        runs = [part.run for part in index.parts.get((MASTER, param.name), ())] or [Run(0, param.numel)]
        parts = shard.cut(module, name, node, [Fragment(param, run, run.start) for run in runs])
        if name == param.name:
            index.parts[kind, name] = parts


def _window(node: TensorNode) -> tuple[Any, ...]:
    return node.storage.key, node.dtype, node.shape, node.stride, node.offset


def _cut_frozen(index: ZeroIndex, described: Sequence[FlatFile], frozen: Sequence[Param]) -> None:
    """Stage 3 has the frozen parameters' partitions in the files of the model, one tensor each."""
    kind = WEIGHTS[1]
    for param in frozen:
        plan = PartitionedParams([param], index.ranks)
        for rank, shard in enumerate(described):
            held = shard.root.get(kind)
            node = held.get(param.name) if type(held) is DictNode else None
            where = f"{shard.path}: its part of {shown(param.name)!r:.80}"
            if type(node) is not TensorNode:
                raise MalformedCheckpoint(f"{where} is missing")
            _check_size(node, plan, rank, where)
            index.parts[kind, param.name] += shard.cut(held, param.name, node, list(plan.fragments(rank)))
