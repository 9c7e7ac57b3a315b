"""States of a FlashOptim run, as its `state_dict` has them: quantised moments, and the low bits of master weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from statecodec import kernels
from statecodec.codecs import Split
from statecodec.dtypes import FLOAT32
from statecodec.errors import MalformedCheckpoint, OptimizerError
from statecodec.optim import sharding
from statecodec.quantised import FLASH_CODES, FLASH_SCALES, of_flashoptim

LOW_BITS = "error_bits"
"""The key of what a master weight has beyond its parameter, as a fraction of half a unit in the last place."""

_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}


def dense_moments(values: Mapping[str, Any], name: str | int) -> dict[str, Any]:
    """The states of one parameter with fp32 moments in place of quantised ones, placed as they are. Raises
    OptimizerError.
    """
    if not any(str(key).endswith(FLASH_CODES) for key in values):
        return dict(values)
    return dict(_decoded(values, name))


def _decoded(values: Mapping[str, Any], name: str | int) -> Iterator[tuple[str, Any]]:
    for key, codes in values.items():
        if key.endswith(FLASH_CODES):
            state = key.removesuffix(FLASH_CODES)
            scales = values.get(state + FLASH_SCALES)
            if not isinstance(codes, Tensor) or not isinstance(scales, Tensor):
                raise OptimizerError(f"{name}: {key} and {state + FLASH_SCALES} are tensors that belong together")
            try:  # groups of a shard are its own
                own = of_flashoptim(state, sharding.local(codes), sharding.local(scales))
            except MalformedCheckpoint as error:
                raise OptimizerError(f"{name}: {error}") from error
            yield state, sharding.joined(own, codes)
        elif not key.endswith(FLASH_SCALES):
            yield key, codes


@torch.no_grad()
def low_part(saved: Tensor, p: Tensor, split: Split, group: Mapping[str, Any]) -> Tensor:
    """What this rank holds of the low part of a split of a parameter, from FlashOptim's.

    Args:
        saved: int8 or int16, or (as FlashOptim saves them) numbers or bits of these under the parameter's dtype.
        p: the parameter, whose values are those that the low bits were saved beside.
        split: how weight and low part make up a master weight.
        group: the saved options, which say how many bytes a master weight has.

    Raises OptimizerError for low bits of another dtype or shape.
    """
    own, bits = sharding.local(p).detach(), sharding.sliced(saved.detach(), p)
    rest = _fractions(bits, own, group) * _half_unit(own)
    backend, specs = kernels.resolve(None, own.device), split.parts(tuple(own.shape), FLOAT32)
    parts = {k: torch.empty(own.shape, dtype=spec.dtype.torch, device=own.device) for k, spec in specs.items()}
    split.encode_into(own.float() + rest, parts, backend)
    tie = parts["high"] != own  # FlashOptim rounds ties to even, a split away from zero: one low bit less
    bits_below = min(split.low_bits, 23 - _MANTISSA[own.dtype])
    split.encode_into(own.float() + torch.where(tie, rest * (1 - 2.0 ** (1 - bits_below)), rest), parts, backend)
    return parts["low"]


def _half_unit(own: Tensor) -> Tensor:
    """Half of the unit in the last place of every element."""
    exponent = torch.frexp(own.float())[1] - 1
    smallest = torch.finfo(own.dtype).smallest_normal
    floor = round(math.log2(smallest))
    return torch.exp2((torch.where(own == 0, floor, exponent.clamp(min=floor)) - _MANTISSA[own.dtype] - 1).float())


def _fractions(bits: Tensor, own: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The saved integers, over the largest that they can be."""
    if bits.shape != own.shape:
        raise OptimizerError(f"{LOW_BITS} of shape {tuple(bits.shape)} for a parameter of {tuple(own.shape)}")
    if bits.dtype in (torch.int8, torch.int16):
        return bits.float() / torch.iinfo(bits.dtype).max
    if bits.dtype != own.dtype:
        raise OptimizerError(f"{LOW_BITS} are int8 or int16, or stand under {own.dtype}; found {bits.dtype}")
    if group.get("master_bytewidth") == 2 * own.element_size():  # their bits stand there
        return bits.contiguous().view(torch.int16).float() / 32767
    return bits.float() / 127
