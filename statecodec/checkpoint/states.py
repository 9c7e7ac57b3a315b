"""States that a live optimizer keeps encoded, recognised by the attributes of their parts, for reports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from statecodec import codecs
from statecodec.codecs import PartSpec
from statecodec.dtypes import STORED, DType
from statecodec.errors import CodecError
from statecodec.layouts import StatePart
from statecodec.names import split_state_part
from statecodec.quantised import PACKAGES, WRAPPED

ATTRIBUTE = "state"
"""Of an item of a compressed file that is such a part."""

_TABLE: Final = 256


@dataclass(frozen=True)
class EncodedState:
    """A state of an optimizer, of which a stored tensor is one part.

    `shape` and `dtype` are those of the decoded state.
    """

    name: str
    role: str
    codec: str
    shape: tuple[int, ...]
    dtype: str


def to_json(part: StatePart) -> dict[str, Any]:
    """The attribute of an item that is a part of a state."""
    return {
        "part": part.part, "role": part.role, "codec": json.loads(part.codec), "shape": list(part.shape),
        "dtype": part.dtype,
    }  # fmt: skip


def encoded_state(value: Any, name: str, shape: tuple[int, ...], dtype: DType) -> EncodedState | None:
    """The state that a tensor of this name, shape and dtype is a part of, from an untrusted attribute.

    None if the codec has no such part.
    """
    if not isinstance(value, Mapping):
        return None
    part, role, config, whole, of = (value.get(key) for key in ("part", "role", "codec", "shape", "dtype"))
    if not isinstance(whole, list) or len(whole) > 64 or not all(type(n) is int and 0 <= n < 1 << 40 for n in whole):
        return None
    if not (isinstance(part, str) and isinstance(role, str) and isinstance(config, dict | str) and isinstance(of, str)):
        return None
    if isinstance(config, dict) and config.get("name") in PACKAGES:
        return _quantised(config, name, EncodedState(part, role, "", tuple(whole), of), shape)
    try:
        codec = codecs.parse(config) if isinstance(config, str) else codecs.from_config(config)
        codec = codec.settled(tuple(whole))
        specs = codec.parts(tuple(whole), STORED[of])
    except (CodecError, KeyError):
        return None
    if specs.get(part) != PartSpec(dtype, tuple(shape)):
        return None
    split = split_state_part(name)
    state_name = split[0] if split else name.removesuffix(f".parts.{part}")
    return EncodedState(state_name, role, codecs.format_codec(codec), tuple(whole), of)


def _quantised(config: Mapping[str, Any], name: str, part: EncodedState, shape: tuple[int, ...]) -> EncodedState | None:
    """A state that another package quantised. No part of it may be larger than the state, except for a short table."""
    bits, state = config.get("bits"), config.get("state")
    if bits not in (4, 8) or not isinstance(state, str) or math.prod(shape) > max(math.prod(part.shape), _TABLE):
        return None
    state_name = f"{name.removesuffix(part.name)}{state}".replace(f"{WRAPPED}.", "")
    return replace(part, name=state_name, codec=f"{config['name']}(bits={bits})")
