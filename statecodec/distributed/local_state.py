"""What one rank saves of a state dict, as a nested object in which `compress` finds moments, weights and settings.

A save plan of torch.distributed.checkpoint lists pieces of tensors by fully qualified names. Here they become
{"model": {...}, "optim": {"state": {PARAMETER: {"exp_avg": ...}}, "param_groups": [...]}} again, however the names were
flattened, with the settings that the rank knows but does not save.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.tensor import DTensor

from statecodec.names import split_state_part

Path = tuple[Any, ...]

_FLAT_STATE: Final = re.compile(r"state\.(.+)\.([^.]+)")  # flatten_optimizer_state_dict
_FLAT_GROUP: Final = re.compile(r"param_groups\.(.+)\.([^.]+)")
_SIMPLE: Final = re.compile(r"[^/\x00-\x1f\x7f]+")
_OTHERS: Final = "other pieces"  # the key for pieces that have no name


@dataclass
class LocalState:
    """The object to compress, and the names of its tensors and values in the compressed file."""

    value: dict[str, Any] = field(default_factory=dict)
    names: dict[MetadataIndex, str] = field(default_factory=dict)
    """Empty for a piece without elements, which is not stored."""
    pieces: dict[MetadataIndex, Tensor] = field(default_factory=dict)
    """The tensors that are saved; values are tensors of their pickled bytes."""

    @classmethod
    def of(cls, plan: SavePlan, planner: SavePlanner) -> LocalState:
        """The state that this rank's part of a plan saves."""
        local = cls()
        state_dict = getattr(planner, "state_dict", {})
        paths = {fqn: _path(fqn, planner) for fqn in state_dict}
        taken: set[str] = set()
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type is WriteItemType.BYTE_IO:
                assert not isinstance(data, Tensor)
                piece = torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8)
                local._other(item.index, piece)
                continue
            assert isinstance(data, Tensor)
            local._add(item.index, data.detach(), paths.get(item.index.fqn) or _path(item.index.fqn, planner), taken)
        for path, setting in _settings(state_dict, paths):
            _put(local.value, path, setting)
        _groups_as_lists(local.value)
        return local

    def _add(self, index: MetadataIndex, piece: Tensor, path: Path, taken: set[str]) -> None:
        if not piece.numel():
            self.names[index], self.pieces[index] = "", piece
            return
        name = ".".join(map(str, path))
        simple = all(_SIMPLE.fullmatch(str(key)) for key in path) and "param_groups" not in path
        if not simple or name in taken or not _put(self.value, path, piece):
            self._other(index, piece)  # a second piece of one tensor, or a name that would be another in the file
            return
        taken.add(name)
        self.names[index], self.pieces[index] = name, piece

    def _other(self, index: MetadataIndex, piece: Tensor) -> None:
        others = self.value.setdefault(_OTHERS, {})
        key = str(len(others))
        others[key] = piece
        self.names[index], self.pieces[index] = f"{_OTHERS}.{key}", piece


def _path(fqn: str, planner: SavePlanner) -> Path:
    """Where an item is in the nested state dict."""
    path: Path = tuple(getattr(planner, "mappings", {}).get(fqn, (fqn,)))
    *outer, last = path
    encoded = split_state_part(str(last))
    if encoded:
        return (*outer, *_flattened(encoded[0]), *encoded[1:])
    return (*outer, *_flattened(last))


def _flattened(key: Any) -> Path:
    """Split a key of a flattened state dict into the path that it was joined from."""
    state, group = _FLAT_STATE.fullmatch(str(key)), _FLAT_GROUP.fullmatch(str(key))
    if state:
        return ("state", *state.groups())
    if group:
        return ("param_groups", *group.groups())
    return (key,)


def _settings(state_dict: Mapping[str, Any], paths: Mapping[str, Path]) -> Iterator[tuple[Path, Any]]:
    """Plain values and single numbers of the whole state dict, which every rank has: lr, betas, step ..."""
    for fqn, value in state_dict.items():
        if isinstance(value, Tensor):
            if value.numel() == 1 and not isinstance(value, DTensor):
                yield paths[fqn], value.detach()
        elif _plain(value):
            yield paths[fqn], value


def _plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, dict):
        return depth < 8 and all(type(k) in (str, int) and _plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return depth < 8 and all(_plain(v, depth + 1) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def _put(root: dict[str, Any], path: Path, value: Any) -> bool:
    """Set a value where nothing is yet; whether that was possible."""
    node = root
    for key in path[:-1]:
        node = node.setdefault(str(key), {})
        if not isinstance(node, dict):
            return False
    return node.setdefault(str(path[-1]), value) is value


def _groups_as_lists(root: dict[str, Any]) -> None:
    """Settings by parameter, as flattened state dicts have them, as torch's groups of one parameter each."""
    for node in [root, *(value for value in root.values() if isinstance(value, dict))]:
        groups = node.get("param_groups")
        if isinstance(groups, dict) and groups and all(isinstance(group, dict) for group in groups.values()):
            node["param_groups"] = [{**group, "params": group.get("params", [name])} for name, group in groups.items()]
