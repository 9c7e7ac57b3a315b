"""States that our live optimizers keep encoded, in the form in which a torch file has them (codecs/plain.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from statecodec.layouts.base import StatePart
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.names import parsed_state_key
from statecodec.roles import STATE_ROLES

_FIRST_KEYS: Final = {"codec", "shape", "dtype", "parts"}  # of version 0.1.0
_MAX_DEPTH: Final = 4


def state_parts(key: str, node: Any) -> Iterator[tuple[TensorNode, StatePart]]:
    """The parts of the state of that key, if it is an encoded one. What its codec says is not checked here."""
    values = node.strings() if type(node) is DictNode else {}
    if len(values) == 1 and (parsed := parsed_state_key(*values)) is not None:
        (parts,) = values.values()
        dtype, shape, text = parsed
        yield from _parts(parts, StatePart("", STATE_ROLES.get(key, "other"), json.dumps(text), shape, dtype))
        return
    if values.keys() != _FIRST_KEYS or type(values["codec"]) is not DictNode:
        return
    shape, dtype = values["shape"], values["dtype"]
    sizes = type(shape) in (list, tuple) and all(type(n) is int and 0 <= n < 1 << 62 for n in shape)
    if not sizes or type(dtype) is not str:
        return
    codec = json.dumps(_plain(values["codec"]))
    yield from _parts(values["parts"], StatePart("", STATE_ROLES.get(key, "other"), codec, tuple(shape), dtype))


def _parts(node: Any, state: StatePart) -> Iterator[tuple[TensorNode, StatePart]]:
    for part, tensor in node.strings().items() if type(node) is DictNode else ():
        if type(tensor) is TensorNode:
            yield tensor, replace(state, part=part)


def _plain(node: Any, depth: int = 0) -> Any:
    """A codec's config as JSON values; null for a value that no config has."""
    if type(node) is DictNode and depth < _MAX_DEPTH:
        return {key: _plain(value, depth + 1) for key, value in node.strings().items()}
    if type(node) in (list, tuple) and len(node) <= 16 and depth < _MAX_DEPTH:
        return [_plain(value, depth + 1) for value in node]
    return node if type(node) in (str, bool, float) or (type(node) is int and node.bit_length() < 64) else None
