"""One file of a ZeRO checkpoint: its objects, and what they say about the partition that is in it."""

from __future__ import annotations

from typing import Any, Final

from statecodec.errors import LayoutError, MalformedCheckpoint
from statecodec.layouts.flat import FlatFile
from statecodec.layouts.listing import ListedFile
from statecodec.layouts.pickle.nodes import DictNode, Opaque
from statecodec.layouts.torch_zip import read_archive

_MASTERS: Final = {"single_partition_of_fp32_groups": (1, 2, None), "fp32_flat_groups": (3,)}


class UnknownForm(Exception):
    """The files are of a form that is not known; nothing is wrong with them."""


def read_shard(file: ListedFile) -> FlatFile:
    """Read a file's pickle. Raises LayoutError, which names the file; UnknownForm if there is no dict in it."""
    try:
        with file.open() as source:
            archive, root = read_archive(source, file.path)
    except LayoutError as error:
        raise MalformedCheckpoint(f"{file.path}: {error}") from None
    if type(root) is not DictNode:
        raise UnknownForm
    return FlatFile(file, archive, root)


class Partition:
    """What rank R's file of the optimizer says: `masters` and `states` of every group, and how it was cut.

    Raises UnknownForm if that is nothing that is known.
    """

    def __init__(self, shard: FlatFile) -> None:
        self.shard, self.path = shard, shard.path
        about = shard.root.get("optimizer_state_dict")
        if type(about) is not DictNode:
            raise UnknownForm
        self.stage, self.masters = _masters(about)
        self.partitions = about.get("partition_count")
        self.paddings = about.get("group_paddings")
        self.mappings = about.get("param_slice_mappings")
        inner = about.get("optimizer_state_dict" if self.stage == 3 else "base_optimizer_state")
        self.states: dict[int, DictNode] = {}
        self.settings: dict[int, DictNode] = {}
        """The settings of the group that a flat tensor is in, by its number."""
        if type(inner) is list:  # of an elastic checkpoint
            self.states = {i: state for i, state in enumerate(inner) if type(state) is DictNode}
        elif type(inner) is DictNode:
            states, groups = inner.get("state"), inner.get("param_groups")
            if type(states) is DictNode:
                self.states = {k: v for k, v in states.items if type(k) is int and type(v) is DictNode}
            for group in groups if type(groups) is list else ():
                params = group.get("params") if type(group) is DictNode else None
                self.settings.update((n, group) for n in (params if type(params) is list else ()) if type(n) is int)

    def padding(self, group: int) -> int:
        """Elements at the end of the group that are no parameter's, as far as they are on this rank."""
        stated = self.paddings[group] if type(self.paddings) is list and group < len(self.paddings) else None
        if type(stated) is not int or stated < 0:
            raise UnknownForm
        return stated

    def mapping(self, group: int) -> dict[str, tuple[Any, Any]] | None:
        """Where the file says that parameters lie in the group's flat tensors: first element, and how many."""
        stated = self.mappings[group] if type(self.mappings) is list and group < len(self.mappings) else None
        if type(stated) is not DictNode:
            return None
        addresses = {}
        for name, address in stated.items:
            about = address.state if type(address) is Opaque else None
            if type(name) is str and type(about) is DictNode:
                addresses[name] = about.get("start"), about.get("numel")
        return addresses


def _masters(about: DictNode) -> tuple[int, list[Any]]:
    """The stage and the flat masters. The bf16 optimizer of stage 1 does not say which stage it is."""
    stated = about.get("zero_stage")
    stage = stated.args[0] if type(stated) is Opaque and len(stated.args) == 1 else stated
    for key, stages in _MASTERS.items():
        masters = about.get(key)
        if type(masters) is list and type(stage) in (int, type(None)) and stage in stages:
            return stage or 1, masters
    raise UnknownForm
