"""Tensors of FSDP1 that are cut among ranks (torch's ShardedTensor), as one rank's file of torch.save has them."""

from __future__ import annotations

from typing import Any, Final

from statecodec.layouts.pickle.nodes import DictNode, Opaque, TensorNode

_INSIDE: Final = frozenset({DictNode, list, Opaque})
_MAX_DEPTH: Final = 8  # deeper than any state dict has tensors


def with_local_shards(node: Any) -> Any:
    """The same object with each sharded tensor as the part of it that the file holds, where that is one tensor."""
    return _replaced(node, 0, {})


def local_shard(node: Any) -> TensorNode | None:
    """The part of a sharded tensor that is in the file; None for anything else, and where there are several."""
    if type(node) is not Opaque or node.name != "ShardedTensor" or type(node.state) is not tuple:
        return None
    shards = node.state[0] if node.state else None
    state = shards[0].state if type(shards) is list and len(shards) == 1 and type(shards[0]) is Opaque else None
    slots = state[1] if type(state) is tuple and len(state) == 2 else state
    tensor = slots.get("tensor") if type(slots) is DictNode else None
    return tensor if type(tensor) is TensorNode else None


def _replaced(node: Any, depth: int, done: dict[int, Any]) -> Any:
    if type(node) is Opaque:
        return local_shard(node) or node
    if type(node) not in (DictNode, list) or depth == _MAX_DEPTH:
        return node
    if id(node) not in done:
        done[id(node)] = node  # what an object that holds itself is met with
        before = [value for _, value in node.items] if type(node) is DictNode else node
        after = [_replaced(value, depth + 1, done) if type(value) in _INSIDE else value for value in before]
        if any(a is not b for a, b in zip(after, before, strict=True)):
            done[id(node)] = _copied(node, after)
    return done[id(node)]


def _copied(node: Any, values: list[Any]) -> Any:
    if type(node) is not DictNode:
        return values
    copy = DictNode(node.kind, node.factory)
    copy.state = node.state
    copy.items = [(key, value) for (key, _), value in zip(node.items, values, strict=True)]
    return copy
