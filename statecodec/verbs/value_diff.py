"""What differs between two loaded checkpoints besides their tensors: settings, counters, schedules, by key path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from statecodec.checkpoint.report import ValueDiff
from statecodec.layouts import OpaqueObject
from statecodec.lazy import torch
from statecodec.names import shown

_MOST: Final = 200  # differences that are listed
_FEW: Final = 32  # numbers of a list that are compared one by one
_LONGEST: Final = 60  # characters of a value
_ABSENT: Final = object()


def value_diffs(a: Any, b: Any) -> tuple[ValueDiff, ...]:
    """The values that differ, in A's order. Tensors are not compared, except with values that are none."""
    diffs: list[ValueDiff] = []
    seen: set[tuple[int, int]] = set()
    pending: list[tuple[tuple[Any, ...], Any, Any]] = [((), a, b)]
    while pending and len(diffs) < _MOST:
        path, x, y = pending.pop()
        if x is y or (id(x), id(y)) in seen:
            continue
        inner = _inside(x, y)
        if inner is None:
            if not _equal(x, y):
                name = ".".join(shown(str(key)[:80]) for key in path[-12:] if key != "")
                diffs.append(ValueDiff(name or "value", _text(x), _text(y)))
            continue
        seen.add((id(x), id(y)))
        pending += [((*path, key), *values) for key, *values in reversed(list(inner))]
    return tuple(diffs)


def _inside(x: Any, y: Any) -> Iterator[tuple[Any, Any, Any]] | None:
    """(key, value in x, value in y) of two containers of a kind; None for anything else."""
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        return ((key, x.get(key, _ABSENT), y.get(key, _ABSENT)) for key in dict.fromkeys((*x, *y)))
    if type(x) is type(y) and isinstance(x, (list, tuple)) and not (_is_array(x) and _is_array(y)):
        longest = range(max(len(x), len(y)))
        return ((i, x[i] if i < len(x) else _ABSENT, y[i] if i < len(y) else _ABSENT) for i in longest)
    if isinstance(x, OpaqueObject) and isinstance(y, OpaqueObject) and (x.module, x.name) == (y.module, y.name):
        inner = [("", x.state, y.state), ("args", x.args, y.args), ("kwargs", x.kwargs, y.kwargs)]
        inner += [("elements", x.elements, y.elements), ("items", dict_of(x.items), dict_of(y.items))]
        return iter(inner)
    return None


def _is_array(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list counts as one value, such as the state of a random generator: many numbers and nothing else."""
    return isinstance(values, torch.Size) or (len(values) > _FEW and all(type(v) in (int, float, bool) for v in values))


def dict_of(items: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Items by the text of their keys, which may be of any type."""
    return {str(key)[:80]: value for key, value in items}


def _equal(x: Any, y: Any) -> bool:
    if all(v is _ABSENT or isinstance(v, torch.Tensor) for v in (x, y)):  # those are compared elsewhere
        return True
    if type(x) is not type(y):
        return False
    if isinstance(x, np.ndarray):
        return bool(x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype.kind == "f"))
    return bool(x == y) or (x != x and y != y)  # NaN equals NaN


def _text(value: Any) -> str:
    """A value, briefly."""
    if value is _ABSENT:
        return "-"
    kind = type(value).__name__.lower()
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{kind} of {' x '.join(map(str, value.shape)) or 'one number'}"
    if isinstance(value, (bytes, bytearray)) and len(value) > 16:
        return f"{len(value):,} bytes"
    inside = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (Mapping, list, tuple, set, frozenset)):
        short = len(value) <= 4 and all(v is None or type(v) in (bool, int, float, str) for v in inside)
        if not short:
            return f"{kind} of {len(value):,}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length():,} bits"
    text = shown(value[: 2 * _LONGEST]) if isinstance(value, str) else shown(repr(value)[: 2 * _LONGEST])
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
