"""Walks a description and names everything that holds numbers: tensors by their key paths, shared containers once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from statecodec.errors import MalformedCheckpoint
from statecodec.layouts.pickle.nodes import DictNode, Opaque, SetNode, StorageNode, TensorNode, children
from statecodec.names import shown

_MAX_DEPTH: Final = 48
_MAX_KEY: Final = 256
_CONTAINERS: Final = frozenset({DictNode, list, tuple, SetNode, Opaque})
_LEAVES: Final = frozenset({TensorNode, StorageNode})
_NODES: Final = _CONTAINERS | _LEAVES


class KeyPath:
    """A key path, shared between siblings: building 10^5 names must not copy 10^5 prefixes."""

    __slots__ = ("inside", "key", "parent", "top")

    def __init__(self, parent: KeyPath | None, key: Any) -> None:
        self.parent, self.key = parent, key
        self.inside: str = "" if parent is None else parent.inside
        """A mark that everything below inherits (roles.py: "optimizer", "other")."""
        self.top: Any = None if parent is None else key if parent.parent is None else parent.top
        """The key of the root's child that this is or is in."""

    def __str__(self) -> str:
        """The dotted path; of very deep paths the last components."""
        keys: list[str] = []
        path: KeyPath | None = self
        while path is not None and path.parent is not None:
            if len(keys) == _MAX_DEPTH:
                keys.append("...")
                break
            keys.append(spell(path.key))
            path = path.parent
        return ".".join(reversed(keys)) or "tensor"


def spell(key: Any) -> str:
    """One component of a dotted path."""
    if type(key) is str:
        return shown(key if len(key) <= _MAX_KEY else key[:_MAX_KEY] + "...")
    if type(key) in (bool, float, type(None)) or (type(key) is int and key.bit_length() < 256):
        return str(key)
    if type(key) is tuple and len(key) <= 8 and all(type(k) in (str, int, float, bool) for k in key):
        return "(" + ",".join(spell(k) for k in key) + ")"
    return f"<{type(key).__name__}>"


def most_tensors(described_bytes: int) -> int:
    """How many tensors a description (pickle, JSON header) of that size may name: far more than any real one does."""
    return 10_000 + described_bytes // 20


def walk(root: Any, limit: int) -> Iterator[tuple[KeyPath, Any]]:
    """Every container, tensor and storage below `root`, in order, each container once. Iterative; cycles are harmless.

    Raises MalformedCheckpoint beyond `limit` tensors.
    """
    seen: set[int] = set()
    leaves = 0
    pending: list[tuple[KeyPath, Any]] = [(KeyPath(None, ""), root)]
    while pending:
        path, node = pending.pop()
        kind = type(node)
        if kind in _LEAVES:
            leaves += 1
            if leaves > limit:
                raise MalformedCheckpoint(f"names more than {limit} tensors, for its size far too many")
            yield path, node
            if kind is StorageNode or node.state is None:
                continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        if kind in _CONTAINERS:
            yield path, node  # before its children are made, so that they inherit what the caller sets on `path`
        below = [(KeyPath(path, key), child) for key, child in children(node) if type(child) in _NODES]
        below.reverse()
        pending.extend(below)


class Names:
    """Hands out names that are unique in a file: the second `x` becomes `x#2`."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """The name, or with `#2`, `#3` ... appended the first that is free."""
        count = self._taken.get(name, 0) + 1
        self._taken[name] = count
        if count == 1:
            return name
        return self.unique(f"{name}#{count}")
