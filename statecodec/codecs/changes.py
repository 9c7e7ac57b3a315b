"""What changed since another checkpoint, its base: the arithmetic on parts, and on values.

A change is no codec: its parts alone do not decode to the tensor. It is a property of a stored item (`Encoding`), and
whoever opens a link of a chain takes the base's parts or values from the base (`statecodec.checkpoint.stored`).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

from statecodec import kernels
from statecodec.codecs.base import Codec
from statecodec.codecs.fp32 import store
from statecodec.codecs.parts import PartSpec, inner_parts
from statecodec.dtypes import INT16, INT32, INT64, UINT8
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_INTEGERS = {1: UINT8, 2: INT16, 4: INT32, 8: INT64}


class Change(Enum):
    """How a stored item relates to the base's tensor. The value is the change's name in files and rules."""

    PARTS = "delta"
    """The bits of the codec's parts as integers, minus those of the base's parts: nothing is lost."""

    VALUES = "residual"
    """The codec's parts of the difference of values: the error is that of the codec on how far training has moved, and
    does not add up along a chain, because the base of each link is what decoding the one before gives.
    """

    @property
    def summary(self) -> str:
        """One sentence for people."""
        if self is Change.PARTS:
            return "With a base: the codec's parts minus the base's parts, as integers; nothing is lost."
        return "With a base: the codec's parts of the values minus the base's values."


def changed_specs(specs: Mapping[str, PartSpec]) -> dict[str, PartSpec]:
    """The dtypes and shapes that `subtract_parts` makes of parts."""
    # Elements wider than eight bytes (complex) are taken apart into integers of eight.
    prefix = Change.PARTS.value
    return {f"{prefix}.{k}": PartSpec(_INTEGERS[min(s.dtype.itemsize, 8)], _integer_shape(s)) for k, s in specs.items()}


def subtract_parts(parts: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tensor's parts minus those of the base (same names, dtypes and shapes), named `delta.*`.

    Each element's bits are subtracted as integers of its width and folded to small unsigned ones (0, -1, 1, -2 ...
    become 0, 1, 2, 3): what changed little has planes of zeros, which pack.
    """
    return {
        f"{Change.PARTS.value}.{name}": _fold(_integers(part) - _integers(base[name])) for name, part in parts.items()
    }


def add_parts(stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `subtract_parts`: the tensor's parts from the stored differences and the base's parts."""
    changes = inner_parts(stored, Change.PARTS.value)
    sums = {name: _integers(part) + _unfold(changes[name]) for name, part in base.items()}
    return {name: whole.view(base[name].dtype).view(base[name].shape) for name, whole in sums.items()}


def subtract_values(codec: Codec, x: Tensor, base: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Encode the difference between a tensor and the base's values.

    Args:
        codec: The codec of the difference.
        x: The tensor, of any float dtype.
        base: The base's values, of as many elements.

    Returns:
        The parts, named `residual.*`, and the values that they decode to.

    Raises:
        UnencodableValues: If the difference holds NaN or infinities.
    """
    encoded = codec.encode(x.to(torch.float32) - base.to(torch.float32).view(x.shape))
    parts = {f"{Change.VALUES.value}.{k}": part for k, part in encoded.parts.items()}
    return parts, add_values(codec, parts, base.view(x.shape), x.dtype)


def add_values(codec: Codec, stored: Mapping[str, Tensor], base: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `subtract_values`: the tensor in the base's shape, with one fp32 addition per element."""
    moved = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    codec.decode_into(inner_parts(stored, Change.VALUES.value), moved, kernels.resolve(None, base.device))
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    store(moved.add_(base.to(torch.float32)), out)
    return out


def _integer_shape(spec: PartSpec) -> tuple[int, ...]:
    return spec.shape if spec.dtype.itemsize <= 8 else (*spec.shape, spec.dtype.itemsize // 8)


def _integers(part: Tensor) -> Tensor:
    integer = _INTEGERS[min(part.dtype.itemsize, 8)].torch
    if part.dtype.itemsize > 8:
        return torch.view_as_real(part.contiguous()).view(integer)
    return part.contiguous().view(integer)


def _fold(x: Tensor) -> Tensor:
    """Two's complement to zigzag, in the same width; bytes go by way of int8."""
    signed = x.view(torch.int8) if x.dtype == torch.uint8 else x
    width = 8 * signed.dtype.itemsize
    return ((signed << 1) ^ (signed >> (width - 1))).view(x.dtype)


def _unfold(x: Tensor) -> Tensor:
    signed = x.view(torch.int8) if x.dtype == torch.uint8 else x
    width = 8 * signed.dtype.itemsize
    positive = (signed >> 1) & ((1 << (width - 1)) - 1)  # a logical shift
    return (positive ^ -(signed & 1)).view(x.dtype)
