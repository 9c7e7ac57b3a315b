"""The object that a DCP folder holds, in the form that torch.save would give: a model, and torch.optim state dicts."""

from __future__ import annotations

import re
from typing import Any, Final

from statecodec.layouts.pickle.nodes import DictNode, TensorNode

_FLAT_STATE: Final = re.compile(r"(?:optim(?:izer)?\.)?state\.(.+)\.([^.]+)")
_FLAT_GROUP: Final = re.compile(r"(?:optim(?:izer)?\.)?param_groups\.(.+)\.([^.]+)")
_MEGATRON_STATE: Final = re.compile(r"(?:.*\.)?optimizer\.state\.(exp_avg|exp_avg_sq|fp32_param)\.(.+)")


def as_torch_saves(value: Any) -> Any:
    """The nested dict of `.metadata` as a node, with flattened optimizers and models where `facts` looks for them."""
    return graph(_regrouped(value))


def _regrouped(value: Any) -> Any:
    """The same object with flattened optimizer states as torch.optim has them: state -> parameter -> tensors."""
    if type(value) is list:
        return [_regrouped(v) for v in value]
    if type(value) is not dict:
        return value
    others: dict[str, Any] = {}
    states: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, inner in value.items():
        if match := _MEGATRON_STATE.fullmatch(key):
            states.setdefault(match[2], {})[match[1]] = inner
        elif match := _FLAT_STATE.fullmatch(key):
            states.setdefault(match[1], {})[match[2]] = inner
        elif match := _FLAT_GROUP.fullmatch(key):
            groups.setdefault(match[1], {"params": [match[1]]})[match[2]] = inner
        else:
            others[key] = _regrouped(inner)
    optimizer = {"state": states, "param_groups": list(groups.values())}
    if not states:
        return _with_model(others)
    return _with_model({**others, "optimizer": optimizer}) if others else optimizer


def _with_model(value: dict[str, Any]) -> dict[str, Any]:
    """Make tensors a model that are saved beside an optimizer with states of their names (torchtitan, Megatron)."""
    tensors = {key: inner for key, inner in value.items() if type(inner) is TensorNode}
    beside = [inner.get("state") for inner in value.values() if type(inner) is dict]
    if not any(type(states) is dict and tensors.keys() & states.keys() for states in beside):
        return value
    if "model" in value.keys() - tensors.keys():  # something else has that place
        return value
    return {"model": tensors, **{key: inner for key, inner in value.items() if key not in tensors}}


def graph(value: Any) -> Any:
    """Dicts as nodes of an object graph."""
    if type(value) is list:
        return [graph(v) for v in value]
    if type(value) is not dict:
        return value
    node = DictNode()
    node.items = [(key, graph(inner)) for key, inner in value.items()]
    return node
