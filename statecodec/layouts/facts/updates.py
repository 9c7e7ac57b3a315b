"""What one step of an optimizer moves a parameter by: moments, weight and the settings of its group."""

from __future__ import annotations

import math
import struct
from typing import Any, Final

from statecodec.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, INT64, UINT8, DType
from statecodec.layouts.facts.file_roles import AdamNodes, FileRoles, MomentumNodes, QuantisedAdamNodes, WeightNode
from statecodec.layouts.facts.quantised import quantised_states
from statecodec.layouts.graph import contiguous
from statecodec.layouts.moments import AdamSettings
from statecodec.layouts.pickle.nodes import DictNode, TensorNode

_LARGEST: Final = ("max_exp_avg_sq", "max_exp_avg_sqs")  # torch's name, and that of older code
_SCALARS: Final[dict[DType, str]] = {
    FLOAT32: "<f", FLOAT64: "<d", FLOAT16: "<e",
    INT64: "<q", INT32: "<i", INT16: "<h", UINT8: "<B", INT8: "<b",
}  # fmt: skip
_DIVISORS: Final = ("square_avg", "grad_avg")  # of RMSprop: what gradients are divided by before its momentum


def adam_nodes(
    file: FileRoles,
    state: dict[str, Any],
    group: dict[str, Any],
    name: str | None,
    weight: WeightNode | None,
) -> AdamNodes | None:
    """The moments of one parameter's Adam state; None if it has not both, or the settings are not Adam's."""
    m, v = state.get("exp_avg"), _divisor(state, group)
    if type(m) is not TensorNode or type(v) is not TensorNode or (m.shape, m.stride) != (v.shape, v.stride):
        return None
    settings = _adam_settings(file, state, group, name)
    if settings is None or not m.dtype.is_floating_point or not v.dtype.is_floating_point:
        return None
    if weight is not None and (weight[1].shape, weight[1].stride) != (m.shape, m.stride):
        weight = None
    return AdamNodes(**vars(settings), exp_avg=m, exp_avg_sq=v, weight=weight)


def _divisor(state: dict[str, Any], group: dict[str, Any]) -> Any:
    """The second moment by whose root the update is divided: under amsgrad its largest value so far."""
    largest = next((state[key] for key in _LARGEST if key in state), None)
    return state.get("exp_avg_sq") if largest is None or group.get("amsgrad") is False else largest


def quantised_nodes(
    file: FileRoles, state: DictNode, group: dict[str, Any], name: str | None, weight: WeightNode | None
) -> QuantisedAdamNodes | None:
    """The moments of one parameter's Adam state where both are quantised, if its weight is known."""
    moments = {found.role: found for found in quantised_states(state, group)}
    settings = _adam_settings(file, state.strings(), group, name)
    if weight is None or settings is None or not {"exp_avg", "exp_avg_sq"} <= moments.keys():
        return None
    first, second = moments["exp_avg"], moments["exp_avg_sq"]
    if not first.shape == second.shape == weight[1].shape or weight[1].stride != contiguous(weight[1].shape):
        return None
    return QuantisedAdamNodes(**vars(settings), exp_avg=first, exp_avg_sq=second, weight=weight)


def _adam_settings(
    file: FileRoles, state: dict[str, Any], group: dict[str, Any], name: str | None
) -> AdamSettings | None:
    """The settings of one parameter's Adam update; None if they are not Adam's."""
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return None
    beta1, beta2, eps = (_number(file, value) for value in (*betas, group.get("eps")))
    if beta1 is None or beta2 is None or eps is None:
        return None
    lr, decay = _rate(file, group), _number(file, group.get("weight_decay"))
    step = _number(file, state.get("step", group.get("step")))
    return AdamSettings(name, beta1, beta2, eps, lr, decay, step)


def momentum_nodes(
    file: FileRoles, state: dict[str, Any], group: dict[str, Any], weight: WeightNode | None
) -> MomentumNodes | None:
    """SGD's, Muon's and RMSprop's `momentum_buffer`, or Lion's `exp_avg`, where a step follows from it alone."""
    keys = [key for key, value in state.items() if type(value) is TensorNode and key != "step"]
    if "momentum_buffer" in keys and not group.get("lr_in_momentum"):  # as TensorFlow's RMSprop has it
        keys = [key for key in keys if key not in _DIVISORS]
    if len(keys) != 1 or keys[0] not in ("momentum_buffer", "exp_avg") or weight is None:
        return None
    m, lr = state[keys[0]], _rate(file, group)
    if (weight[1].shape, weight[1].stride) != (m.shape, m.stride) or not m.dtype.is_floating_point:
        return None
    if keys[0] == "exp_avg":
        return MomentumNodes(lr, 1.0, False, m, weight)  # Lion's update is a sign
    if "ns_steps" not in group or not m.shape:
        return MomentumNodes(lr, None, False, m, weight)
    # Muon's orthogonal update, scaled for its shape, has an rms of 1 / sqrt(columns), or one like Adam's.
    like_adam = "match_rms_adamw" in (group.get("adjust_lr_fn"), group.get("adjust"))
    columns = max(math.prod(m.shape[1:]), 1)
    return MomentumNodes(lr, 0.2 if like_adam else 1 / math.sqrt(columns), True, m, weight)


def _rate(file: FileRoles, group: dict[str, Any]) -> float | None:
    """The learning rate; where a schedule has it at 0, the one that the schedule began with."""
    lr = _number(file, group.get("lr"))
    return lr or _number(file, group.get("initial_lr")) or lr


def _number(file: FileRoles, value: Any) -> float | None:
    """A finite setting: a plain number, or a one-element tensor read from the file."""
    if type(value) is TensorNode:
        data = file.facts.scalars.get(value.index)
        if data is None or value.bits:
            return None
        if value.dtype is BFLOAT16:
            value = struct.unpack("<f", b"\0\0" + data)[0]
        elif value.dtype in _SCALARS:
            value = struct.unpack(_SCALARS[value.dtype], data)[0]
    if type(value) is int and value.bit_length() > 1000:
        return None
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def common_settings(groups: list[DictNode]) -> dict[str, Any]:
    """The settings that all groups share."""
    first = groups[0].strings() if groups else {}
    plain = {k: v for k, v in first.items() if type(v) in (int, float, tuple)}
    return {k: v for k, v in plain.items() if all(_same(group.get(k), v) for group in groups)}


def _same(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=False) if type(a) is type(b) is tuple and len(a) == len(b) else [(a, b)]
    return all(type(x) is type(y) and type(x) in (int, float) and x == y for x, y in pairs)
