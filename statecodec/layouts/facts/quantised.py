"""States that other 8- and 4-bit optimizers keep quantised, in the form in which torch files have them.

bitsandbytes (`state1` and `state2` with `absmax` and `qmap`, in newer versions one level deeper), torchao (subclasses
of Tensor) and FlashOptim (`exp_avg::quantized` with `exp_avg::scales`). statecodec/verbs/quantised.py decodes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

from statecodec.layouts.base import Shape, StatePart
from statecodec.layouts.pickle.nodes import DictNode, Opaque, TensorNode
from statecodec.quantised import FLASH_CODES, FLASH_SCALES, TORCHAO, WRAPPED
from statecodec.roles import STATE_ROLES, Role

_MAX_DIMS: Final = 64


def unwrapped(state: DictNode) -> DictNode:
    """A parameter's state without the level that bitsandbytes adds; its 32-bit moments under torch's names."""
    values = state.strings()
    inside = values.get(WRAPPED)
    if type(inside) is DictNode:
        values = {**values, **inside.strings()}
        del values[WRAPPED]
    first, second = values.get("state1"), values.get("state2")
    if _is_float(first) and _is_float(second) and first.shape == second.shape:
        values = {{"state1": "exp_avg", "state2": "exp_avg_sq"}.get(key, key): value for key, value in values.items()}
    if values is state.strings():
        return state
    bare = DictNode()
    bare.items = list(values.items())
    return bare


@dataclass(frozen=True)
class QuantisedNodes:
    """A quantised state: by their keys the codes, the scales and, where there is one, the table."""

    package: str
    bits: int
    name: str
    shape: Shape
    parts: Mapping[str, Any]

    @property
    def role(self) -> Role:
        """What the state is to the optimizer."""
        return STATE_ROLES.get(self.name, "other")


def quantised_parts(state: DictNode, settings: Mapping[str, Any]) -> Iterator[tuple[TensorNode, StatePart]]:
    """The parts of the quantised states of one parameter; `settings` are those of its group."""
    for found in quantised_states(state, settings):
        config = json.dumps({"name": found.package, "bits": found.bits, "state": found.name})
        for key, node in found.parts.items():
            if type(node) is TensorNode:
                yield node, StatePart(key, found.role, config, found.shape, "float32")


def quantised_states(state: DictNode, settings: Mapping[str, Any]) -> Iterator[QuantisedNodes]:
    """The quantised states of one parameter; parts may be missing, or be no tensors."""
    values = state.strings()
    for key, value in values.items():
        if key.endswith(FLASH_CODES):
            yield from _flash(key.removesuffix(FLASH_CODES), values)
        elif type(value) is Opaque and value.name in TORCHAO and value.module.startswith("torchao."):
            yield from _torchao(key, value)
    for number in (1, 2):
        codes, scales = values.get(f"state{number}"), values.get(f"absmax{number}")
        if type(codes) is TensorNode and codes.dtype.itemsize == 1 and type(scales) is TensorNode:
            name = _of_bitsandbytes(number, "state2" in values, settings)
            parts = {f"{key}{number}": values.get(f"{key}{number}") for key in ("state", "absmax", "qmap")}
            yield QuantisedNodes("bitsandbytes", 8, name, codes.shape, parts)


def _of_bitsandbytes(number: int, two: bool, settings: Mapping[str, Any]) -> str:
    """What a state is: of a single one only the settings tell Lion and SGD, whose eps is 0, from the others."""
    if two:
        return ("exp_avg", "exp_avg_sq")[number - 1]
    betas = settings.get("betas")
    if settings.get("eps") != 0 or not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return f"state{number}"
    return "exp_avg" if betas[1] else "momentum_buffer"


def _flash(name: str, values: dict[str, Any]) -> Iterator[QuantisedNodes]:
    codes, scales = values[name + FLASH_CODES], values.get(name + FLASH_SCALES)
    if type(codes) is TensorNode and type(scales) is TensorNode:
        parts = {name + FLASH_CODES: codes, name + FLASH_SCALES: scales}
        yield QuantisedNodes("flashoptim", 8, name, codes.shape, parts)


def _torchao(name: str, value: Opaque) -> Iterator[QuantisedNodes]:
    attributes = value.state.strings() if type(value.state) is DictNode else {}
    codes, shape = attributes.get("codes"), attributes.get("_shape")
    if type(codes) is not TensorNode:
        return
    whole = tuple(shape) if isinstance(shape, (tuple, list)) else codes.shape
    if len(whole) <= _MAX_DIMS and all(type(n) is int and 0 <= n < 1 << 40 for n in whole):
        parts = {f"{name}.{key}": attributes.get(key) for key in ("codes", "scale", "qmap")}
        yield QuantisedNodes("torchao", TORCHAO[value.name], name, whole, parts)


def is_shared(part: StatePart) -> bool:
    """Whether it may be one table for many parameters."""
    return part.part.endswith(("qmap", "qmap1", "qmap2"))


def _is_float(node: Any) -> TypeGuard[TensorNode]:
    return type(node) is TensorNode and node.dtype.is_floating_point and node.dtype.itemsize > 1
