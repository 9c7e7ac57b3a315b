"""Locates the tensors of Megatron-LM's own format: a folder `mp_rank_TT[_PPP]` for each model-parallel rank.

    model_optim_rng.pt   weights, and the optimizer: with states, or, if that is distributed, with settings only
    distrib_optim.pt     what a distributed optimizer holds, flat: buffer -> dtype -> param, exp_avg, exp_avg_sq

The flat buffers (fp32; a tensor each, or a list of one for each bucket) lie beside each other element by element. They
are cut where megatron_order.py expects parameters to end, if their sizes fit. What lies there has a role, settings and
a shape, but no name.

Source: megatron/core/optimizer/distrib_optimizer.py, get_parameter_state_dp_zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from statecodec.errors import LayoutError, MalformedCheckpoint
from statecodec.layouts import opaque, torch_zip
from statecodec.layouts.flat import FlatFile
from statecodec.layouts.listing import ListedFile, Listing
from statecodec.layouts.megatron_order import BufferOrder
from statecodec.layouts.payload import Payload
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.layouts.protocol import Claim, Located, together
from statecodec.layouts.walk import most_tensors, walk

name: Final = "megatron"

_MODEL: Final = "model_optim_rng.pt"
_FLAT: Final = "distrib_optim.pt"
_RANK: Final = re.compile(r"(?:.*/)?mp_rank_\d+(?:_\d+)*")
_KEYS: Final = {"param": "master_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Of a buffer, and what they are in the states of an optimizer."""


def claims(listing: Listing) -> Claim | None:
    """Both files of a rank's folder, because the shapes of what is flat are in the other one; or one that is alone."""
    only = listing.only
    if only is not None:
        folder = only.path.rpartition("/")[0]
        alone = _is_mine(only) and (not listing.is_directory or _RANK.fullmatch(folder) is not None)
        return Claim((only.path,)) if alone else None
    both = [file for file in (listing.get(_MODEL), listing.get(_FLAT)) if file is not None and _is_mine(file)]
    return Claim(tuple(file.path for file in both)) if len(both) == 2 else None


def locate(listing: Listing) -> Located:
    """Read the pickles. Raises LayoutError for a damaged file, and for buffers of different lengths.

    Of two files a damaged one is carried as bytes, so that it does not cost the other.
    """
    order, parts = BufferOrder(), []
    for file in sorted(listing.files.values(), key=_is_flat):
        located, order = _located(file, order, listing)
        parts.append(located)
    return replace(together(parts), framework="Megatron-LM")


def tree(listing: Listing, read: Payload) -> Any:
    """What torch.load gives; of two files by their names."""
    if listing.only is not None:
        return torch_zip.tree(listing, read)
    return {path.rpartition("/")[2]: torch_zip.tree(listing.of((path,)), read) for path in sorted(listing.files)}


def _is_mine(file: ListedFile) -> bool:
    return file.path.rpartition("/")[2] in (_MODEL, _FLAT) and torch_zip.is_zip(file.magic)


def _is_flat(file: ListedFile) -> bool:
    return file.path.endswith(_FLAT)


def _located(file: ListedFile, order: BufferOrder, listing: Listing) -> tuple[Located, BufferOrder]:
    """What is in a file whose buffers are in that order, and the order that it tells for the next one."""
    try:
        with file.open() as source:
            flat = FlatFile(file, *torch_zip.read_archive(source, file.path))
            optimizer = _optimizer(flat, order) if _is_flat(file) else None
            graph = torch_zip.graph_of(flat.archive, flat.root, flat.added)
            located = graph.located(name, file, source, listing.prefix(file.path))
    except LayoutError as error:
        if listing.only is not None:
            raise
        return Located((opaque.carried(file, error),)), order
    (facts,) = located.facts
    described = replace(located, facts=(replace(facts, root=optimizer or flat.root),))
    return described, BufferOrder.of(flat.root, graph.limit)


def _optimizer(flat: FlatFile, order: BufferOrder) -> DictNode | None:
    """The buffers as the states of an optimizer that has no groups of its own; None where there are no buffers.

    In the file's objects, parts of parameters take the place of a buffer that `order` knows.
    """
    states: list[list[TensorNode]] = []
    for buffer in list(_buffers(flat)):
        tensors = [place.node for place in buffer.places]
        if not _beside_each_other(tensors, buffer.numel):
            raise MalformedCheckpoint(f"{flat.path}: param, exp_avg and exp_avg_sq are not flat buffers of one size")
        dense = all(node.stride == (1,) for node in tensors)
        fragments = order.take(tensors[0].shape[0]) if dense else []
        cut = [flat.cut(*place, fragments) for place in buffer.places if fragments]
        states += [[part.node for part in parts] for parts in zip(*cut, strict=True)] or [tensors]
    optimizer, state = DictNode(), DictNode()
    for number, tensors in enumerate(states):
        moments = DictNode()
        moments.items = list(zip(_KEYS.values(), tensors, strict=True))
        state.items.append((number, moments))
    optimizer.items = [("state", state), ("param_groups", [])]
    return optimizer if states else None


class _Place(NamedTuple):
    """Where a file's objects have something."""

    holder: Any
    key: Any
    node: Any


@dataclass(frozen=True)
class _Buffer:
    """What stands under `_KEYS`, and the number of elements that it is said to have."""

    places: list[_Place]
    numel: Any


def _beside_each_other(tensors: list[Any], numel: Any) -> bool:
    if not all(type(t) is TensorNode and t.dtype.is_floating_point and len(t.shape) == 1 for t in tensors):
        return False
    first, *others = (t.shape[0] for t in tensors)
    return all(size == first for size in others) and numel in (None, first)


def _buffers(flat: FlatFile) -> Iterator[_Buffer]:
    """Every dict of `_KEYS`: where they are lists, of a tensor for each bucket, one for each of those."""
    for _, node in walk(flat.root, most_tensors(len(flat.archive.pickle))):
        if type(node) is not DictNode or not node.strings().keys() & _KEYS.keys():
            continue
        lists = [node.get(key) for key in _KEYS]
        if not all(type(values) is list for values in lists) or len({len(values) for values in lists}) != 1:
            yield _Buffer([_Place(node, key, node.get(key)) for key in _KEYS], node.get("numel_unpadded"))
            continue
        for number, bucket in enumerate(zip(*lists, strict=True)):
            places = [_Place(of, number, tensor) for of, tensor in zip(lists, bucket, strict=True)]
            yield _Buffer(places, None)
