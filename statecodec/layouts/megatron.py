"""Locates the tensors of Megatron-LM's own format: a folder `mp_rank_TT[_PPP]` for each model-parallel rank.

    model_optim_rng.pt   weights, and the optimizer: with states, or, if that is distributed, with settings only
    distrib_optim.pt     what a distributed optimizer holds, flat: buffer -> dtype -> param, exp_avg, exp_avg_sq

The flat buffers (fp32; a tensor each, or a list of one for each bucket) lie beside each other element by element. Which
parameter is where in them no file says, so they have roles and settings, but no names.

Source: megatron/core/optimizer/distrib_optimizer.py, get_parameter_state_dp_zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, Final

from statecodec.errors import MalformedCheckpoint
from statecodec.layouts import torch_zip
from statecodec.layouts.listing import ListedFile, Listing
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.layouts.protocol import Claim, Located, Read

name: Final = "megatron"

_MODEL: Final = "model_optim_rng.pt"
_FLAT: Final = "distrib_optim.pt"
_RANK: Final = re.compile(r"(?:.*/)?mp_rank_\d+(?:_\d+)*")
_KEYS: Final = {"param": "master_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Of a buffer, and what they are in the states of an optimizer."""
_MAX_DEPTH: Final = 5


def claims(listing: Listing) -> Claim | None:
    """One rank's folder, or one of its files."""
    folder = listing.folder
    if listing.only is not None:
        folder = listing.only.path.rpartition("/")[0]
        if not listing.is_directory:  # a file on its own has no folder; its name is Megatron's
            folder = "mp_rank_00"
    if not _RANK.fullmatch(folder):
        return None
    mine = [p for p, f in listing.files.items() if _is_mine(p, folder, listing) and torch_zip.is_zip(f.head)]
    return Claim(tuple(mine)) if mine else None


def locate(listing: Listing) -> Located:
    """Read the pickles. Raises LayoutError: damaged files, and buffers that do not lie beside each other."""
    found = [_located(listing, file) for file in listing.files.values()]
    return Located(
        tuple(chain.from_iterable(f.files for f in found)),
        tuple(chain.from_iterable(f.tensors for f in found)),
        facts=tuple(chain.from_iterable(f.facts for f in found)),
        framework="Megatron-LM",
    )


def tree(listing: Listing, read: Read) -> Any:
    """What torch.load gives for each file, by the file's name; of a single file just that."""
    if listing.only is not None:
        return torch_zip.tree(listing, read)
    return {path.rpartition("/")[2]: torch_zip.tree(listing.of((path,)), read) for path in sorted(listing.files)}


def _is_mine(path: str, folder: str, listing: Listing) -> bool:
    above, _, base = path.rpartition("/")
    return base in (_MODEL, _FLAT) and (above == folder or not listing.is_directory)


def _located(listing: Listing, file: ListedFile) -> Located:
    with file.open() as source:
        archive, root = torch_zip.read_archive(source, file.path)
        located = torch_zip.graph_of(archive, root).located(name, file, source, listing.prefix(file.path))
    if not file.path.endswith(_FLAT):
        return located
    (facts,) = located.facts
    return replace(located, facts=(replace(facts, root=_optimizer(root, file.path)),))


def _optimizer(root: Any, path: str) -> DictNode:
    """The flat buffers as the states of an optimizer that has no groups of its own."""
    state = DictNode()
    for buffer in _buffers(root, 0):
        tensors = [buffer.get(key) for key in _KEYS]
        if not _beside_each_other(tensors, buffer.get("numel_unpadded")):
            raise MalformedCheckpoint(f"{path}: param, exp_avg and exp_avg_sq are not flat buffers of one size")
        own = DictNode()
        own.items = list(zip(_KEYS.values(), tensors, strict=True))
        state.items.append((len(state.items), own))
    if not state.items:
        raise MalformedCheckpoint(f"{path} holds no buffers of a distributed optimizer")
    optimizer = DictNode()
    optimizer.items = [("state", state), ("param_groups", [])]
    return optimizer


def _beside_each_other(tensors: list[Any], numel: Any) -> bool:
    if not all(type(t) is TensorNode and t.dtype.is_floating_point and len(t.shape) == 1 for t in tensors):
        return False
    first, *others = (t.shape[0] for t in tensors)
    return all(size == first for size in others) and numel in (None, first)


def _buffers(node: Any, depth: int) -> Iterator[DictNode]:
    """Every dict of `_KEYS`: where they are lists, of a tensor for each bucket, one for each of those."""
    if depth == _MAX_DEPTH:
        return
    if type(node) is list:
        for each in node:
            yield from _buffers(each, depth + 1)
    elif type(node) is DictNode and node.strings().keys() & _KEYS.keys():
        lists = [node.get(key) for key in _KEYS]
        if not all(type(values) is list for values in lists) or len({len(values) for values in lists}) != 1:
            yield node
            return
        for bucket in zip(*lists, strict=True):
            one = DictNode()
            one.items = list(zip(_KEYS, bucket, strict=True))
            yield one
    elif type(node) is DictNode:
        for _, inner in node.items:
            yield from _buffers(inner, depth + 1)
