"""The one plain-dict form of an encoded tensor, as it stands in an optimizer's state_dict().

    {"codec": {"name": "companded", "version": 1, "curve": "softsign", ...},    Codec.config(), JSON
     "shape": [768, 3072],                                                      of the decoded tensor
     "dtype": "float32",                                                        of the decoded tensor, torch's name
     "parts": {"codes": tensor, "scales": tensor}}                              Codec.parts(), by name, nothing else

Exactly these four keys. Values are dicts, lists, strings, ints and tensors: torch.save writes it,
torch.load(weights_only=True) reads it, and whatever walks a checkpoint recognises it by its keys (for torch's key
paths: `<name>.codec.name`, `<name>.parts.codes`) and can keep the parts as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from statecodec import dtypes
from statecodec.codecs.base import EncodedTensor
from statecodec.codecs.spec import from_config
from statecodec.errors import FormatError
from statecodec.lazy import torch

if TYPE_CHECKING:
    pass

KEYS = frozenset(("codec", "shape", "dtype", "parts"))
_MAX_DIMS = 64


def is_plain(value: object) -> bool:
    """Whether a value has the keys of the plain form (its contents are not checked)."""
    return isinstance(value, Mapping) and set(value) == KEYS


def to_plain(encoded: EncodedTensor) -> dict[str, Any]:
    """The plain form; its part tensors are the encoded tensor's own, not copies."""
    return {
        "codec": encoded.codec.config(),
        "shape": list(encoded.shape),
        "dtype": dtypes.name_of(encoded.dtype),
        "parts": dict(encoded.parts),
    }


def from_plain(value: Mapping[str, Any]) -> EncodedTensor:
    """The encoded tensor of a plain form (untrusted); shares the part tensors.

    Raises FormatError if anything but the documented keys, types, part names, dtypes and shapes is found, and what
    `codecs.from_config` raises for the config.
    """
    if not is_plain(value):
        raise FormatError(f"an encoded tensor has the keys {sorted(KEYS)}, found {_shown(value)}")
    shape, dtype, parts = value["shape"], value["dtype"], value["parts"]
    short = isinstance(shape, list | tuple) and len(shape) <= _MAX_DIMS
    if not short or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"an encoded tensor's shape is a list of sizes, found {_shown(shape)}")
    if not isinstance(dtype, str) or dtype not in dtypes.STORED:
        raise FormatError(f"an encoded tensor's dtype is one of {', '.join(dtypes.STORED)}, found {_shown(dtype)}")
    if not isinstance(parts, Mapping) or not all(isinstance(t, torch.Tensor) for t in parts.values()):
        raise FormatError(f"an encoded tensor's parts are tensors by name, found {_shown(parts)}")
    codec = from_config(value["codec"]).settled(tuple(shape))
    return EncodedTensor(codec, tuple(shape), dtypes.STORED[dtype].torch, dict(parts))


def _shown(value: object) -> str:
    return str(list(value))[:200] if isinstance(value, Mapping) else repr(value)[:200]
