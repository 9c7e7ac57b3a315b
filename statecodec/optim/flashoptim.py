"""Reads states of FlashOptim's `state_dict`: quantised moments, and the low bits of master weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from statecodec.buffers import has_data
from statecodec.codecs import Split
from statecodec.errors import MalformedCheckpoint, OptimizerError
from statecodec.flash_groups import FlashGroups, FlashMoment, are_quantised, flash_shards
from statecodec.optim import sharding
from statecodec.optim.agreement import all_say_yes
from statecodec.quantised import FLASH_CODES, FLASH_LOW_BITS, FLASH_SCALES, of_flashoptim

_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}


def saved_shards(saved: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> int:
    """In how many shards each parameter was when the quantised moments of a state dict were saved; all ranks must ask.

    Args:
        saved: parameters, and what was saved of each.

    Raises OptimizerError if no number fits all of them.
    """
    found = ((p, codes, scales) for p, values in saved for codes, scales in _quantised(values).values())
    fitting = [(p, *parts) for p, *parts in found if _have_data(*parts) and are_quantised(*parts)]
    fitting = [(p, codes, scales) for p, codes, scales in fitting if codes.shape == p.shape]
    moments = [
        FlashMoment(tuple(p.shape), scales.numel(), partial(_held, p, codes, scales)) for p, codes, scales in fitting
    ]
    try:
        return flash_shards(moments, partial(all_say_yes, [p for p, *_ in fitting]))
    except MalformedCheckpoint as error:
        raise OptimizerError(str(error)) from error


def dense_moments(values: Mapping[str, Any], name: str | int, p: Tensor, shards: int) -> Iterator[tuple[str, Any]]:
    """The states of one parameter with fp32 moments in place of quantised ones, placed as the parameter is.

    Args:
        values: what was saved of it.
        name: what messages call it.
        p: the parameter.
        shards: in how many it was then.

    Raises OptimizerError for codes and scales that do not belong together.
    """
    quantised = _quantised(values)
    for state, (codes, scales) in quantised.items():
        if not _have_data(codes, scales):
            raise OptimizerError(
                f"{name}: {state}{FLASH_CODES} and {state}{FLASH_SCALES} are tensors that belong together"
            )
        if codes.shape != p.shape:
            raise OptimizerError(f"{name}: {state} has shape {tuple(codes.shape)}, the parameter {tuple(p.shape)}")
        try:
            moment = of_flashoptim(state, *_held(p, codes, scales), FlashGroups(p.numel(), shards))
        except MalformedCheckpoint as error:
            raise OptimizerError(f"{name}: {error}") from error
        yield state, sharding.joined(moment, p)
    parts = {state + part for state in quantised for part in (FLASH_CODES, FLASH_SCALES)}
    yield from ((key, value) for key, value in values.items() if key not in parts)


def _quantised(values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Codes and scales, as they are found, of every quantised moment of a parameter."""
    states = [key.removesuffix(FLASH_CODES) for key in values if isinstance(key, str) and key.endswith(FLASH_CODES)]
    return {state: (values[state + FLASH_CODES], values.get(state + FLASH_SCALES)) for state in states}


def _have_data(*parts: object) -> bool:
    return all(isinstance(part, Tensor) and has_data(part) for part in parts)


def _held(p: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes that this rank holds of a parameter, their places, and all scales."""
    return sharding.sliced(codes, p).to(p.device), sharding.places(p), sharding.whole(scales).to(p.device)


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
    shard, bits = sharding.local(p).detach(), sharding.sliced(saved.detach(), p)
    fraction = _rounding_to(shard, _fractions(bits, shard, group), split)
    exact = torch.copysign(shard.float().abs() + fraction * _half_unit(shard), shard)
    return split.encode(exact).parts["low"]


def _rounding_to(shard: Tensor, fraction: Tensor, split: Split) -> Tensor:
    """Fractions of half a unit, away from zero, by which a split of the sum still has the weight as its high part.

    Outward the furthest is just below a tie, which FlashOptim rounds to even and a split away from zero. Inward of a
    power of two the unit is half as large, and there is nothing inward of zero.
    """
    outward = 1 - 2.0 ** (1 - min(split.low_bits, 23 - _MANTISSA[shard.dtype]))
    size = shard.float().abs()
    is_power = (torch.frexp(size).mantissa == 0.5) & (size > torch.finfo(shard.dtype).smallest_normal)
    inward = torch.where(is_power, 0.5, 1.0).masked_fill(shard == 0, 0.0)
    return torch.where(shard.signbit(), -fraction, fraction).clamp(max=outward).maximum(-inward)


def _half_unit(shard: Tensor) -> Tensor:
    """Half of the unit in the last place of every element."""
    info = torch.finfo(shard.dtype)
    exponent = torch.frexp(shard.float().abs().clamp(min=info.smallest_normal)).exponent
    return torch.exp2(exponent + math.log2(info.eps / 4))


def _fractions(bits: Tensor, shard: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The saved integers, over the largest that they can be."""
    if bits.shape != shard.shape:
        raise OptimizerError(f"{FLASH_LOW_BITS} of shape {tuple(bits.shape)} for a parameter of {tuple(shard.shape)}")
    if bits.dtype in (torch.int8, torch.int16):
        return bits.float() / torch.iinfo(bits.dtype).max
    if bits.dtype != shard.dtype:
        raise OptimizerError(f"{FLASH_LOW_BITS} are int8 or int16, or stand under {shard.dtype}; found {bits.dtype}")
    if group.get("master_bytewidth") == 2 * shard.element_size():  # the integers' bits, under the parameter's dtype
        return bits.contiguous().view(torch.int16).float() / 32767
    return bits.float() / 127
