"""Decodes states that other 8- and 4-bit optimizers keep quantised into dense fp32 states."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from statecodec.buffers import has_data
from statecodec.errors import MalformedCheckpoint, UsageError
from statecodec.flash_groups import FlashGroups, FlashMoment, are_quantised, flash_shards
from statecodec.layouts.objects import OpaqueObject
from statecodec.lazy import torch
from statecodec.quantised import FLASH_CODES, FLASH_LOW_BITS, FLASH_SCALES, TORCHAO, WRAPPED, Blocks, of_flashoptim

if TYPE_CHECKING:
    from torch import Tensor

LOW_BITS_ARE_LEFT_OUT: Final = (
    "FlashOptim's error_bits (low bits of master weights) are left out: weights stay as they are"
)


def is_quantised(states: Mapping[Any, Any]) -> bool:
    """Whether any state of an optimizer's `state` is quantised by another package."""
    return any(isinstance(state, Mapping) and any(map(_is_foreign, state.items())) for state in states.values())


def has_low_bits(states: Mapping[Any, Any]) -> bool:
    """Whether FlashOptim keeps the low bits of master weights among these states."""
    return any(isinstance(state, Mapping) and "error_bits" in state for state in states.values())


def saved_shards(states: Mapping[Any, Any]) -> int:
    """In how many shards the parameters were, each with groups of its own, if FlashOptim's moments are among these.

    Raises MalformedCheckpoint if no number fits all of them, or numbers are missing.
    """

    def found() -> Iterator[FlashMoment]:
        for state in states.values():
            for key, codes in state.items() if isinstance(state, Mapping) else ():
                name = key.removesuffix(FLASH_CODES) if isinstance(key, str) else key
                scales = state.get(f"{name}{FLASH_SCALES}")
                both = isinstance(codes, torch.Tensor) and isinstance(scales, torch.Tensor)
                if name != key and both and are_quantised(codes, scales):
                    parts = _tensor(codes, name), _tensor(scales, name)
                    yield FlashMoment(tuple(codes.shape), scales.numel(), partial(_all, *parts))

    return flash_shards(found())


def _all(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, where they are, and their scales."""
    return codes, torch.arange(codes.numel(), device=codes.device).view(codes.shape), scales


def dense(state: Mapping[str, Any], shards: int = 1) -> dict[str, Any]:
    """The state of one parameter with fp32 tensors under torch's names.

    Args:
        state: As `load` gives it, not trusted: of bitsandbytes, torchao or FlashOptim, or any other, which stays.
        shards: in how many shards it was, if it is FlashOptim's.

    Raises MalformedCheckpoint for parts that do not fit together, UsageError for what has no counterpart in Adam.
    """
    inner = state.get(WRAPPED)
    flat = {**state, **inner} if isinstance(inner, Mapping) else dict(state)
    flat.pop(WRAPPED, None)
    decoded = dict(_plain(flat, shards))
    if "state1" in flat:
        decoded.update(_of_bitsandbytes(flat))
    if not {"exp_avg", "exp_avg_sq"} <= decoded.keys():
        raise UsageError(
            "quantised states with one moment (Lion, SGD, RMSprop ...) are not AdamW's; they stay as they are"
        )
    if "step" in decoded and not isinstance(decoded["step"], torch.Tensor):
        decoded["step"] = torch.tensor(float(decoded["step"]), dtype=torch.float32, device="cpu")
    return decoded


def _is_foreign(item: tuple[Any, Any]) -> bool:
    key, value = item
    return key == WRAPPED or key == "state1" or str(key).endswith(FLASH_CODES) or _is_torchao(value)


def _is_torchao(value: Any) -> bool:
    return isinstance(value, OpaqueObject) and value.name in TORCHAO and value.module.startswith("torchao.")


def _plain(flat: Mapping[str, Any], shards: int) -> Iterator[tuple[str, Any]]:
    """All entries except those of bitsandbytes and the low bits of weights, which torch's optimizers do not take."""
    for key, value in flat.items():
        if not isinstance(key, str):
            yield key, value
        elif key.endswith(FLASH_CODES):
            name = key.removesuffix(FLASH_CODES)
            parts = _all(_tensor(value, name), _tensor(flat.get(name + FLASH_SCALES), name))
            yield name, of_flashoptim(name, *parts, FlashGroups(value.numel(), shards))
        elif _is_torchao(value):
            yield key, _of_torchao(key, value)
        elif not key.startswith(("state", "qmap", "absmax")) and not key.endswith((FLASH_SCALES, FLASH_LOW_BITS)):
            yield key, value


def _of_bitsandbytes(flat: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    if "state2" not in flat:
        raise UsageError(
            "states of bitsandbytes with one moment (Lion, SGD, RMSprop ...) are no AdamW's; kept as they are"
        )
    for number, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        codes = _tensor(flat.get(f"state{number}"), name)
        if codes.dtype.is_floating_point:
            yield name, codes.float()
            continue
        scales, table = (_tensor(flat.get(f"{key}{number}"), name) for key in ("absmax", "qmap"))
        blocks = Blocks("bitsandbytes", 8, tuple(codes.shape), scales.numel())
        yield name, blocks.decode(name, codes, scales, table).reshape(codes.shape)


def _of_torchao(name: str, value: OpaqueObject) -> Tensor:
    attributes = value.state if isinstance(value.state, Mapping) else {}
    codes, scales = (_tensor(attributes.get(key), name) for key in ("codes", "scale"))
    bits = TORCHAO[value.name]
    shape = tuple(attributes.get("_shape", ())) if bits == 4 else tuple(codes.shape)
    if math.prod(shape) != codes.numel() * 8 // bits:
        raise MalformedCheckpoint(f"{name}: {codes.numel()} codes of torchao of {bits} bits, shape {shape}")
    table = None if codes.dtype.is_floating_point else _tensor(attributes.get("qmap"), name)
    return Blocks("torchao", bits, shape, scales.numel()).decode(name, codes, scales, table).reshape(shape)


def _tensor(value: Any, name: str) -> Tensor:
    if not isinstance(value, torch.Tensor):
        raise MalformedCheckpoint(f"{name}: a part of the quantised state is missing, or is {type(value).__name__}")
    if not has_data(value) or value.nbytes > value.untyped_storage().nbytes():
        raise MalformedCheckpoint(f"{name}: fewer numbers are stored than the {value.numel()} of a quantised state")
    return value
