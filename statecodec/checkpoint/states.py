"""States that a live optimizer keeps encoded: known by what their parts say of them, for reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from statecodec import codecs
from statecodec.codecs import PartSpec
from statecodec.dtypes import STORED, DType
from statecodec.errors import CodecError
from statecodec.layouts import StatePart

ATTRIBUTE = "state"
"""Of an item of a compressed file that is such a part."""


@dataclass(frozen=True)
class EncodedState:
    """A state of an optimizer, of which a stored tensor is one part: `shape` and `dtype` are the decoded state's."""

    name: str
    role: str
    codec: str
    shape: tuple[int, ...]
    dtype: str


def to_json(part: StatePart) -> dict[str, Any]:
    """The attribute of an item."""
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
    if not (isinstance(part, str) and isinstance(role, str) and isinstance(config, dict) and isinstance(of, str)):
        return None
    try:
        codec = codecs.from_config(config).settled(tuple(whole))
        specs = codec.parts(tuple(whole), STORED[of])
    except (CodecError, KeyError):
        return None
    if specs.get(part) != PartSpec(dtype, tuple(shape)):
        return None
    return EncodedState(name.removesuffix(f".parts.{part}"), role, codecs.format_codec(codec), tuple(whole), of)
