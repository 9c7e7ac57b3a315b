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
from typing import Any, Final

from statecodec.errors import MalformedCheckpoint
from statecodec.layouts import torch_zip
from statecodec.layouts.listing import Listing
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.layouts.protocol import Claim, Located, Read
from statecodec.layouts.walk import walk

name: Final = "megatron"

_MODEL: Final = "model_optim_rng.pt"
_FLAT: Final = "distrib_optim.pt"
_RANK: Final = re.compile(r"(?:.*/)?mp_rank_\d+(?:_\d+)*")
_KEYS: Final = {"param": "master_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Of a buffer, and what they are in the states of an optimizer."""


def claims(listing: Listing) -> Claim | None:
    """One of the files, in a rank's folder or alone. Each is claimed alone, so that a damaged one costs no other."""
    file = listing.only
    if file is None or not torch_zip.is_zip(file.magic):
        return None
    folder, _, base = file.path.rpartition("/")
    is_mine = base in (_MODEL, _FLAT) and (not listing.is_directory or _RANK.fullmatch(folder) is not None)
    return Claim((file.path,)) if is_mine else None


def locate(listing: Listing) -> Located:
    """Read the pickle. Raises LayoutError for a damaged file, and for buffers of different lengths."""
    file = listing.only
    assert file is not None
    with file.open() as source:
        archive, root = torch_zip.read_archive(source, file.path)
        graph = torch_zip.graph_of(archive, root)
        located = replace(graph.located(name, file, source, listing.prefix(file.path)), framework="Megatron-LM")
    if not file.path.endswith(_FLAT):
        return located
    (facts,) = located.facts
    return replace(located, facts=(replace(facts, root=_optimizer(root, graph.limit, file.path)),))


def tree(listing: Listing, read: Read) -> Any:
    """What torch.load gives."""
    return torch_zip.tree(listing, read)


def _optimizer(root: Any, limit: int, path: str) -> Any:
    """The flat buffers as the states of an optimizer that has no groups of its own; without buffers `root` as it is."""
    state = DictNode()
    for buffer in _buffers(root, limit):
        tensors = [buffer.get(key) for key in _KEYS]
        if not _beside_each_other(tensors, buffer.get("numel_unpadded")):
            raise MalformedCheckpoint(f"{path}: param, exp_avg and exp_avg_sq are not flat buffers of one size")
        moments = DictNode()
        moments.items = list(zip(_KEYS.values(), tensors, strict=True))
        state.items.append((len(state.items), moments))
    if not state.items:
        return root
    optimizer = DictNode()
    optimizer.items = [("state", state), ("param_groups", [])]
    return optimizer


def _beside_each_other(tensors: list[Any], numel: Any) -> bool:
    if not all(type(t) is TensorNode and t.dtype.is_floating_point and len(t.shape) == 1 for t in tensors):
        return False
    first, *others = (t.shape[0] for t in tensors)
    return all(size == first for size in others) and numel in (None, first)


def _buffers(root: Any, limit: int) -> Iterator[DictNode]:
    """Every dict of `_KEYS`: where they are lists, of a tensor for each bucket, one for each of those."""
    for _, node in walk(root, limit):
        if type(node) is not DictNode or not node.strings().keys() & _KEYS.keys():
            continue
        lists = [node.get(key) for key in _KEYS]
        if not all(type(values) is list for values in lists) or len({len(values) for values in lists}) != 1:
            yield node
            continue
        for bucket in zip(*lists, strict=True):
            of_bucket = DictNode()
            of_bucket.items = list(zip(_KEYS, bucket, strict=True))
            yield of_bucket
