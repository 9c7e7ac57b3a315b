"""Tells running averages of weights from weights, by their names or by what is saved beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from statecodec.layouts.pickle.nodes import DictNode, TensorNode

_AVERAGE: Final = re.compile(r"(^|[._/-])(ema|swa|shadow|averaged?)([._/-]|$)", re.IGNORECASE)
_LIST: Final = "shadow_params"
_LIGHTNING: Final = ("current_model_state", "averaging_state")


def is_average(path: str) -> bool:
    """Whether a key path or file name says that what is there is a running average of weights."""
    return _AVERAGE.search(path) is not None


def averages_in(node: DictNode) -> Iterator[int]:
    """The ids of containers, this one or its children, that hold running averages.

    torch's AveragedModel counts what it averages, in `n_averaged`. Lightning's WeightAveraging saves its averages as
    `state_dict`, and the weights that are trained as `current_model_state`. diffusers and torch-ema keep a list
    `shadow_params`, in the order of the model's parameters.
    """
    keys = node.strings()
    if type(keys.get("n_averaged")) is TensorNode:
        yield id(node)
    if type(keys.get(_LIST)) is list:
        yield id(keys[_LIST])
    if all(type(keys.get(key)) is DictNode for key in _LIGHTNING):
        yield id(keys.get("state_dict"))
