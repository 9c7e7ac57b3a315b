"""Locates the tensors of DeepSpeed's ZeRO (stages 1 to 3): a folder with one or more files of model and of optimizer.

    mp_rank_00_model_states.pt                   stages 1 and 2: the weights, and names and shapes of all parameters
    zero_pp_rank_R_mp_rank_00_model_states.pt    stage 3: the same without weights
    zero_pp_rank_R_mp_rank_00_optim_states.pt    rank R's part of masters and moments, flat: one tensor for each group

zero_partitions.py says what the flat tensors hold. Each is cut where a parameter ends, and so are the weights, so that
a weight lies beside its master piece by piece; padding stays as it is. A checkpoint of another form (experts, for one)
is located file by file, as torch files are; one whose numbers contradict each other is an error.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from statecodec.errors import MalformedCheckpoint
from statecodec.layouts import torch_zip
from statecodec.layouts.base import LogicalTensor, Piece, SourceFile
from statecodec.layouts.flat import FlatFile, Param, PartWindow
from statecodec.layouts.graph import contiguous
from statecodec.layouts.listing import ListedFile, Listing
from statecodec.layouts.parts import are_whole
from statecodec.layouts.payload import Payload
from statecodec.layouts.pickle.nodes import DictNode, StorageNode, TensorNode
from statecodec.layouts.protocol import Claim, Facts, Located, together
from statecodec.layouts.walk import Names, most_tensors
from statecodec.layouts.zero_index import WEIGHTS, ZeroIndex, read_index
from statecodec.layouts.zero_shards import UnknownForm
from statecodec.names import shown

name: Final = "zero"

_STATES: Final = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")
_MODEL: Final = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_model_states\.pt")


def claims(listing: Listing) -> Claim | None:
    """A folder's ZeRO files, if at least one of an optimizer is among them."""
    if not listing.is_directory:
        return None
    folder = f"{listing.folder}/" if listing.folder else ""
    inside = [p for p in listing.files if "/" not in p[len(folder) :]]
    states = [p for p in inside if _STATES.fullmatch(p[len(folder) :])]
    return Claim((*states, *(p for p in inside if _MODEL.fullmatch(p[len(folder) :])))) if states else None


def locate(listing: Listing) -> Located:
    """Read the pickles of all files. Raises LayoutError."""
    try:
        indices = _indices(listing)
    except UnknownForm:
        return together([torch_zip.locate(listing.of((path,))) for path in listing.files])
    names = Names()
    several = len(indices) > 1
    parts = [_located(listing, index, f"mp_rank_{i:02d}." if several else "", names) for i, index in indices.items()]
    first = next(iter(indices.values()))
    ranks = f"{first.ranks} x {len(indices)} ranks" if several else f"{first.ranks} rank{'s' * (first.ranks > 1)}"
    return replace(together(parts), framework=f"DeepSpeed ZeRO-{first.stage}, {ranks}")


def tree(listing: Listing, read: Payload) -> Any:
    """What torch.load gives for each file, by the file's name."""
    return {path.rpartition("/")[2]: torch_zip.tree(listing.of((path,)), read) for path in sorted(listing.files)}


def _indices(listing: Listing) -> dict[int, ZeroIndex]:
    """What each model-parallel rank's files say, by that rank."""
    kinds: tuple[dict[int, dict[int, ListedFile]], ...] = (defaultdict(dict), defaultdict(dict))
    for path, file in listing.files.items():
        for kind, pattern in zip(kinds, (_MODEL, _STATES), strict=True):
            match = pattern.fullmatch(path.rpartition("/")[2])
            if match is None:
                continue
            by_rank, rank = kind[int(match[2])], int(match[1] or 0)
            if rank in by_rank:
                raise MalformedCheckpoint(f"{path} and {by_rank[rank].path} are the same rank's: of two checkpoints?")
            by_rank[rank] = file
    models, states = kinds
    folder = listing.folder or "the folder"
    return {rank: read_index(models[rank], states[rank], folder) for rank in sorted({*models, *states})}


# ---- one model-parallel rank


def _located(listing: Listing, index: ZeroIndex, mark: str, names: Names) -> Located:
    """The files of one model-parallel rank; `mark` is what its tensors' names begin with."""
    placed = _Placed(index)
    for shard in index.shards:
        placed.add(shard, listing.prefix(shard.path))
    prefix = listing.prefix(listing.folder) + mark
    tensors: list[LogicalTensor] = []
    nodes: list[TensorNode] = []
    model = DictNode()
    states: dict[str, DictNode] = defaultdict(DictNode)
    for (kind, name), parts in index.parts.items():
        spelled = f"{kind}.{name}" if kind in WEIGHTS else f"optimizer.state.{name}.{kind}"
        tensor = placed.joined(index.params[name], parts, names.unique(prefix + shown(spelled)))
        node = _whole(tensor, number=len(nodes))
        tensors.append(tensor)
        nodes.append(node)
        (holder, key) = (model, name) if kind in WEIGHTS else (states[name], kind)
        holder.items.append((key, node))
    others = [replace(tensor, name=names.unique(tensor.name)) for tensor in placed.others]
    scalars: dict[int, bytes] = {}
    root = _object(index, model, states, _Numbering(placed.scalars, len(nodes), scalars))
    facts = Facts(index.shards[0].path, root, most_tensors(len(nodes) * 100), True, scalars, tuple((n,) for n in nodes))
    return Located(tuple(placed.files), (*tensors, *others), facts=(facts,))


class _Placed:
    """Where the parts of tensors are, once their files are cut into regions."""

    def __init__(self, index: ZeroIndex) -> None:
        self.files: list[SourceFile] = []
        self.others: list[LogicalTensor] = []
        """Tensors that are no parts."""
        self.scalars: dict[int, bytes] = {}
        """By the id of their node, the bytes of tensors of one element."""
        self._places: dict[int, int] = {}
        self._parts = {id(part.node) for parts in index.parts.values() for part in parts}
        self._steps = {id(node) for node in index.steps}

    def add(self, shard: FlatFile, prefix: str) -> None:
        """Cut one file. Raises MalformedCheckpoint where parts and other tensors overlap."""
        with shard.file.open() as source:
            located = torch_zip.graph_of(shard.archive, shard.root, shard.added).located(
                name, shard.file, source, prefix
            )
        (facts,) = located.facts
        self.files += located.files
        for number, (tensor, nodes) in enumerate(zip(located.tensors, facts.windows, strict=True)):
            cut = [node for node in nodes if id(node) in self._parts]
            if cut and (number in facts.shared or len(cut) > 1):
                raise MalformedCheckpoint(f"{shard.path}: other tensors overlap {tensor.name!r:.80}")
            self._places.update((id(node), number) for node in cut)
            self.scalars.update((id(n), facts.scalars[n.index]) for n in nodes if n.index in facts.scalars)
            if not cut:
                is_step = any(id(node) in self._steps for node in nodes)
                self.others.append(replace(tensor, role="step") if is_step else tensor)

    def joined(self, param: Param, parts: Sequence[PartWindow], spelled: str) -> LogicalTensor:
        """A tensor from its parts, which must cover all of it exactly once. Raises MalformedCheckpoint."""
        ordered = sorted(parts, key=lambda part: part.run.start)
        dtype = ordered[0].node.dtype
        if any(part.node.dtype != dtype for part in ordered) or not are_whole(param.shape, [p.run for p in ordered]):
            raise MalformedCheckpoint(
                f"{ordered[0].path}: {spelled!r:.100} is not whole, or not of one dtype, in all files"
            )
        runs = [part.run if len(ordered) > 1 else None for part in ordered]
        pieces = (Piece(part.path, self._places[id(part.node)], run) for part, run in zip(ordered, runs, strict=True))
        return LogicalTensor(spelled, dtype, param.shape, tuple(pieces))


# ---- the saved object, as an optimizer that was not sharded would have it


@dataclass
class _Numbering:
    """Gives the tensors of one element that settings refer to numbers behind those of the tensors."""

    scalars: dict[int, bytes]
    count: int
    numbered: dict[int, bytes]

    def __call__(self, value: Any) -> Any:
        if type(value) is not TensorNode or id(value) not in self.scalars:
            return value
        node = TensorNode(value.storage, value.dtype, value.shape, value.stride, value.offset)
        node.index, self.count = self.count, self.count + 1
        self.numbered[node.index] = self.scalars[id(value)]
        return node


def _object(index: ZeroIndex, model: DictNode, states: dict[str, DictNode], number: _Numbering) -> DictNode:
    groups = []
    for names, settings, step in index.settings:
        group = _dict(params=names)
        group.items += [
            (k, number(v)) for k, v in (settings.items if settings else ()) if k not in ("params", "param_names")
        ]
        groups.append(group)
        counter = [] if step is None else [("step", number(step))]
        for each in states.keys() & set(names):
            states[each].items += counter
    state = DictNode()
    state.items = list(states.items())
    return _dict(model=model, optimizer=_dict(state=state, param_groups=groups))


def _dict(**items: Any) -> DictNode:
    node = DictNode()
    node.items = list(items.items())
    return node


def _whole(tensor: LogicalTensor, number: int) -> TensorNode:
    """A tensor as a node, on a storage of its own."""
    storage = StorageNode(tensor.name, tensor.dtype, "cpu", math.prod(tensor.shape), untyped=False)
    node = TensorNode(storage, tensor.dtype, tensor.shape, contiguous(tensor.shape), 0)
    node.index, node.is_parameter = number, True
    return node
