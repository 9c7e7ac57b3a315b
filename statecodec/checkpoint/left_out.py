"""Takes out of a loaded object what no other program can load: objects of classes that were not run."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from statecodec.errors import UsageError
from statecodec.layouts.objects import OpaqueObject
from statecodec.lazy import torch
from statecodec.names import shown

if TYPE_CHECKING:
    from torch import Tensor

MAX_DEPTH = 100


_LONGEST = 64 << 20  # bytes of a view that are written although its memory is smaller


def without_opaque(value: Any) -> tuple[Any, list[str]]:
    """The same object without its OpaqueObjects, and what was left out: key paths, with what was there.

    In dicts their keys are missing, in lists and tuples they are replaced by None. What was shared is still shared.
    Raises UsageError for values that are nested too deeply.
    """
    pruning = _Pruning()
    return pruning.pruned(value, "", 0), pruning.left_out


def written_out(value: Any) -> tuple[Any, list[str]]:
    """Like `without_opaque`, for files that hold every element of a tensor.

    Without large views whose elements are at the same place many times, too: one number may be a tensor of any size.
    """
    pruning = _Pruning(written_out=True)
    return pruning.pruned(value, "", 0), pruning.left_out


class _Pruning:
    def __init__(self, *, written_out: bool = False) -> None:
        self._written_out = written_out
        self.left_out: list[str] = []
        self._made: dict[int, tuple[Any, Any]] = {}
        """Identity of a container -> it, so that it lives on, and what was made of it."""

    def pruned(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise UsageError(f"{path:.80}...: nested more than {MAX_DEPTH} deep")
        if id(value) in self._made:
            return self._made[id(value)][1]
        if isinstance(value, OpaqueObject):
            return self._gone(value, path)
        if self._written_out and isinstance(value, torch.Tensor) and _is_stretched(value):
            return self._gone(f"a tensor {list(value.shape)} that repeats the elements of a smaller one", path)
        if isinstance(value, dict):
            return self._dict(value, path, depth)
        if type(value) in (list, tuple):
            return self._sequence(value, path, depth)
        if type(value) in (set, frozenset) and any(isinstance(v, OpaqueObject) for v in value):
            return self._gone(value, path)
        return value

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> dict[Any, Any]:
        copy: dict[Any, Any] = OrderedDict() if type(value) is OrderedDict else {}
        self._made[id(value)] = value, copy
        for key, inner in value.items():
            where = joined(path, key)
            kept = self._gone(key, f"{where} (the key)") if isinstance(key, OpaqueObject) else None
            if kept is None and not isinstance(key, OpaqueObject):
                kept = self.pruned(inner, where, depth + 1)
            if kept is not None or inner is None:
                copy[key] = kept
        return copy

    def _sequence(self, value: list[Any] | tuple[Any, ...], path: str, depth: int) -> Any:
        if type(value) is list:
            copy: list[Any] = []
            self._made[id(value)] = value, copy
            copy += [self.pruned(inner, joined(path, i), depth + 1) for i, inner in enumerate(value)]
            return copy
        copied = tuple(self.pruned(inner, joined(path, i), depth + 1) for i, inner in enumerate(value))
        self._made[id(value)] = value, copied
        return copied

    def _gone(self, value: Any, path: str) -> Any:
        """Note what was left out; returns the None that replaces it."""
        self.left_out.append(f"{path or 'all of it'}: {value if type(value) is str else repr(value):.120}")
        return None


def _is_stretched(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    nbytes = math.prod(tensor.shape) * tensor.itemsize
    return nbytes > max(_LONGEST, tensor.untyped_storage().nbytes())


def joined(path: str, key: Any) -> str:
    """A key path with one more key."""
    return f"{path}.{shown(str(key))}" if path else shown(str(key))


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples, shared ones once."""
    total, pending, seen = 0, [value], set[int]()
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            pending += each.values()
        elif isinstance(each, (list, tuple)):
            pending += each
        elif isinstance(each, torch.Tensor):
            total += each.nbytes
    return total
