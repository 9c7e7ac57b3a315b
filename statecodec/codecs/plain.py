"""The one plain form of an encoded tensor, as an optimizer's state_dict() has it.

    {"float32[768,3072] companded(version=2,curve=softsign,bits=8,group=32)": {"codes": tensor, "scales": tensor}}

The one key says dtype and shape of the decoded tensor and the codec with all its fields; its value holds the parts, by
name, and nothing else. So there are only dicts and tensors: torch.save writes it, torch.load(weights_only=True) reads
it, torch's state dict functions shard, gather and flatten it (and on the way back split keys at every dot), and a
checkpoint has one item per part. Code that walks a checkpoint recognises it by the key.

States saved by version 0.1.0 had the keys `codec` (its config), `shape`, `dtype` and `parts`; they are still read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from statecodec import dtypes
from statecodec.codecs.base import Codec, EncodedTensor
from statecodec.codecs.spec import described, from_config, parse
from statecodec.errors import FormatError
from statecodec.lazy import torch
from statecodec.names import parsed_state_key, split_state_part, state_key

if TYPE_CHECKING:
    from torch import Tensor

_FIRST_KEYS = frozenset(("codec", "shape", "dtype", "parts"))
_MAX_DIMS = 64
_MAX_PARTS = 64
_MAX_DEPTH = 16  # of keys taken apart


def is_plain(value: object) -> bool:
    """Whether a value has the keys of the plain form. Its contents are not checked.

    Args:
        value: Any value.

    Returns:
        True if it has.
    """
    if not isinstance(value, Mapping) or not 0 < len(value) <= len(_FIRST_KEYS):
        return False
    return set(value) == _FIRST_KEYS or all(_starts_a_key(key) for key in value)


def to_plain(encoded: EncodedTensor) -> dict[str, Any]:
    """Turn an encoded tensor into its plain form.

    Args:
        encoded: The encoded tensor.

    Returns:
        A dict of one key; its part tensors are the encoded tensor's own, not copies.

    Example:
        >>> from statecodec.codecs import Raw
        >>> to_plain(Raw().encode(torch.ones(2)))
        {'float32[2] raw(version=1)': {'data': tensor([1., 1.])}}
    """
    key = state_key(dtypes.name_of(encoded.dtype), encoded.shape, described(encoded.codec))
    return {key: dict(encoded.parts)}


def from_plain(value: Mapping[str, Any]) -> EncodedTensor:
    """Turn a plain form, which is not trusted, into an encoded tensor.

    Args:
        value: The plain form.

    Returns:
        The encoded tensor, which shares the part tensors.

    Raises:
        FormatError: If it is no plain form, or its parts do not fit the codec.
        CodecError: If its codec is unknown or has wrong fields.
        UnsupportedVersion: If its codec is of a version that is not known here.
    """
    if not is_plain(value):
        raise FormatError(f"an encoded tensor has one key such as 'float32[8,4] raw(version=1)', found {_shown(value)}")
    codec, shape, dtype, parts = _first_form(value) if set(value) == _FIRST_KEYS else _keyed(value)
    if dtype not in dtypes.STORED:
        raise FormatError(f"an encoded tensor's dtype is one of {', '.join(dtypes.STORED)}, found {_shown(dtype)}")
    return EncodedTensor(codec.settled(shape), shape, dtypes.STORED[dtype].torch, parts)


def _keyed(value: Mapping[str, Any]) -> tuple[Codec, tuple[int, ...], str, dict[str, Tensor]]:
    keys, parts = set(), {}
    for path, part in _leaves(value, "", 0):
        names = split_state_part(path)
        if names is None or names[0] or not isinstance(part, torch.Tensor):
            raise FormatError(f"an encoded tensor's parts are tensors by name, found {_shown(part)} under {path[:200]}")
        keys.add(names[1])
        parts[names[2]] = part
        if len(keys) > 1:
            raise FormatError(
                f"two encodings of one tensor: {' and '.join(sorted(keys))}. torch adds what is loaded to what is "
                "there: a full state of another encoding goes in by optimizer.load_state_dict, on every rank"
            )
        if len(parts) > _MAX_PARTS:
            raise FormatError(f"an encoded tensor of more than {_MAX_PARTS} parts")
    state = parsed_state_key(keys.pop()) if keys else None
    if state is None:
        raise FormatError(f"an encoded tensor without parts, or with a key that says no codec: {_shown(value)}")
    dtype, shape, codec = state
    return parse(codec), shape, dtype, parts


def _first_form(value: Mapping[str, Any]) -> tuple[Codec, tuple[int, ...], str, dict[str, Tensor]]:
    shape, dtype, parts = value["shape"], value["dtype"], value["parts"]
    short = isinstance(shape, list | tuple) and len(shape) <= _MAX_DIMS
    if not short or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"an encoded tensor's shape is a list of sizes, found {_shown(shape)}")
    if not isinstance(parts, Mapping) or not all(isinstance(t, torch.Tensor) for t in parts.values()):
        raise FormatError(f"an encoded tensor's parts are tensors by name, found {_shown(parts)}")
    return from_config(value["codec"]), tuple(shape), dtype if isinstance(dtype, str) else "", dict(parts)


def _leaves(value: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    """What is not a dict, by its dotted path."""
    if depth > _MAX_DEPTH:
        raise FormatError(f"an encoded tensor nested more than {_MAX_DEPTH} deep")
    for key, inner in value.items():
        path = f"{prefix}.{key}" if depth else str(key)
        if isinstance(inner, Mapping):
            yield from _leaves(inner, path, depth + 1)
        else:
            yield path, inner


def _starts_a_key(key: object) -> bool:
    """Whether a text is a key of the plain form, or its beginning up to a dot."""
    if not isinstance(key, str):
        return False
    dtype, bracket, rest = key.partition("[")
    return bool(bracket) and dtype in dtypes.STORED and "] " in rest


def _shown(value: object) -> str:
    return str(list(value))[:200] if isinstance(value, Mapping) else repr(value)[:200]
