"""Saved states of one parameter, in whatever form they come, made into the states of its recipe.

States in the recipe's own encoding are taken bit for bit. Those of torch.optim or of another method are decoded to
dense tensors and encoded again; the ChangeLog says what that lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from statecodec import dtypes, kernels
from statecodec.buffers import has_data
from statecodec.codecs import EncodedTensor, Raw, Split, format_codec
from statecodec.codecs.base import FLOATS
from statecodec.codecs.plain import from_plain, is_plain
from statecodec.dtypes import FLOAT32
from statecodec.errors import OptimizerError
from statecodec.optim import flashoptim, sharding
from statecodec.optim.dense import (
    MOMENTS,
    decode_moments,
    every_moment,
    low_rank_gain,
    relative_error,
    update_direction,
)
from statecodec.optim.load_report import ChangeLog
from statecodec.optim.method import LOW, Group, Recipe, StateSpec, matrix_shape
from statecodec.optim.options import number
from statecodec.quantised import FLASH_LOW_BITS

COUNTERS = ("step", "skipped")


def fresh(recipe: Recipe, p: Tensor, group: Group) -> dict[str, Any]:
    """The states of a parameter before its first step."""
    return {**counters(p), **low_part(recipe, p), **recipe.method.init(p, recipe, group)}


def counters(p: Tensor, step: float = 0, skipped: float = 0) -> dict[str, Tensor]:
    """`step` and `skipped`, beside the parameter. fp32 counts to 2**24, whatever torch's default dtype is."""
    numbers = {"step": step, "skipped": skipped}
    return {k: torch.full((), n, dtype=torch.float32, device=p.device) for k, n in numbers.items()}


def low_part(recipe: Recipe, p: Tensor) -> dict[str, EncodedTensor]:
    """A low part of zeros, if the parameter has one."""
    return {} if recipe.low is None else {LOW: recipe.low.zeros(p)}


def adopt(
    recipe: Recipe, p: Tensor, group: Group, values: Mapping[str, Any], saved: Mapping[str, Any], log: ChangeLog
) -> dict[str, Any]:
    """The states of a parameter from saved ones; nothing of them is shared.

    Args:
        recipe: what the parameter's states are here.
        p: the parameter.
        group: the options that it will be stepped with.
        values: its saved states by name: tensors, encoded tensors, or their plain form.
        saved: the options that they were made with.
        log: where every change is noted.

    Raises OptimizerError for states of another shape or kind; FormatError and others of `from_plain` for broken ones.
    """
    name = recipe.label
    values = dict(values)
    low_bits = values.pop(FLASH_LOW_BITS, None)
    encoded = {k: _encoded(v, name, k, p) for k, v in values.items() if k in (*MOMENTS, LOW)}
    for k in values.keys() - encoded.keys() - set(COUNTERS):
        log.add(name, str(k), "dropped", "amsgrad" if k == "max_exp_avg_sq" else type(values[k]).__name__)
    if "step" not in values and encoded.keys() - {LOW, "momentum_buffer"}:
        log.add(name, "step", "reset", "nothing", "1")
    # torch.optim.SGD counts no steps; a buffer that exists has seen one.
    step = _count(values.get("step", 1 if encoded else 0), name, "step")
    counted = counters(p, step, _count(values.get("skipped", 0), name, "skipped"))
    low = (
        _low(recipe, p, encoded.pop(LOW, None), log) if low_bits is None else _low_bits(recipe, p, low_bits, saved, log)
    )
    for k in encoded.keys() - recipe.specs.keys():
        log.add(name, k, "dropped", format_codec(encoded[k].codec))
    if all(k in encoded and fits(encoded[k], s) for k, s in recipe.specs.items()):
        return {**counted, **low, **{k: _copy(encoded[k], s, p) for k, s in recipe.specs.items()}}
    moments = _through_dense(recipe, encoded, p, int(step), group, saved, log)
    if moments is None:
        source = ", ".join(encoded) or "nothing"
        for k, s in recipe.specs.items():
            log.add(name, k, "reset", source, format_codec(s.codec))
        return {**counted, "step": counters(p)["step"], **low, **recipe.method.init(p, recipe, group)}
    return {**counted, **low, **moments}


def fits(encoded: EncodedTensor, spec: StateSpec) -> bool:
    """Whether a state is stored as the recipe says."""
    return encoded.codec == spec.codec and encoded.shape == spec.shape and encoded.dtype == spec.dtype


def in_place(state: Mapping[str, Any], recipe: Recipe, p: Tensor) -> bool:
    """Whether a parameter's states are what its recipe says, on its device."""
    counted = all(
        isinstance(state.get(k), Tensor) and state[k].dtype == torch.float32 and state[k].device == p.device
        for k in COUNTERS
    )
    stored = all(
        isinstance(state.get(k), EncodedTensor) and fits(state[k], spec) and sharding.is_placed(state[k], p)
        for k, spec in recipe.stored.items()
    )
    return counted and stored and (recipe.low is not None or LOW not in state)


@torch.no_grad()
def recast(p: Tensor, split: Split, low: EncodedTensor, recipe: Recipe) -> dict[str, EncodedTensor] | None:
    """Keep a master weight when its parameter is cast to another dtype (`model.to(...)`).

    The part that was below the old dtype goes into the new one, and what that cannot hold into a new low part.

    Args:
        p: The parameter, cast already.
        split: How it and its low part made up a master weight before.
        low: The low part from before.
        recipe: What the parameter's states are now.

    Returns:
        The new low part, if there is one; None if the parameter has changed by more than a cast, so that the low part
        says nothing about it.
    """
    shard = sharding.local(p)
    high = shard.detach().to(split.parts((1,), FLOAT32)["high"].dtype.torch).contiguous()
    old = sharding.local(low.parts["data"]).to(shard.device)
    if not torch.equal(high.to(p.dtype), shard) or old.shape != shard.shape:
        return None
    backend = kernels.resolve(None, shard.device)
    exact = torch.empty(shard.shape, dtype=torch.float32, device=shard.device)
    split.decode_into({"high": high, "low": old}, exact, backend)
    new_low = low_part(recipe, p)
    if recipe.split is None:
        shard.copy_(exact)
    else:
        high = torch.empty(shard.shape, dtype=p.dtype, device=shard.device)
        recipe.split.encode_into(exact, {"high": high, "low": sharding.local(new_low[LOW].parts["data"])}, backend)
        shard.copy_(high)
    return new_low


def _count(value: object, name: str | int, key: str) -> float:
    count = number(value)
    if not isinstance(count, int | float) or not 0 <= count < 2**53:
        raise OptimizerError(f"{name}: {key} is a number of steps, found {str(value)[:80]}")
    return float(count)


def _encoded(value: object, name: str | int, state: str, p: Tensor) -> EncodedTensor:
    """A saved state in any form, of the shape of the parameter or of its matrix view."""
    if isinstance(value, Tensor):
        value = EncodedTensor(Raw(), tuple(value.shape), value.dtype, {"data": value.detach()})
    elif is_plain(value):
        value = from_plain(value)  # type: ignore[arg-type]
    if not isinstance(value, EncodedTensor):
        raise OptimizerError(f"{name}: {state} is a tensor or an encoded tensor, found {type(value).__name__}")
    _check_kind(value, name, state)
    shape = tuple(p.shape)
    if value.shape != shape and (len(shape) < 2 or value.shape != matrix_shape(shape)):
        raise OptimizerError(
            f"{name}: {state} has shape {value.shape}, the parameter {shape}; "
            "delete the parameter's entry in `state` to start it afresh"
        )
    return value


def _check_kind(value: EncodedTensor, name: str | int, state: str) -> None:
    """Raise OptimizerError for tensors that hold no numbers, or not of the kind that the state is."""
    if not all(map(has_data, value.parts.values())):
        raise OptimizerError(f"{name}: {state} is a sparse tensor or has no data")
    if not (value.dtype in (torch.int8, torch.int16) if state == LOW else dtypes.of(value.dtype) in FLOATS):
        kinds = "int8 or int16" if state == LOW else "a float"
        raise OptimizerError(f"{name}: {state} is {kinds}, found {value.dtype}")


def _copy(encoded: EncodedTensor, spec: StateSpec, p: Tensor) -> EncodedTensor:
    parts = {k: sharding.placed(spec.codec, t, p) for k, t in encoded.parts.items()}
    return EncodedTensor(spec.codec, spec.shape, spec.dtype, parts)


def _low(recipe: Recipe, p: Tensor, saved: EncodedTensor | None, log: ChangeLog) -> dict[str, EncodedTensor]:
    """The low part of the master weight; widths convert, 16 to 8 bits by rounding."""
    name, part = recipe.label, low_part(recipe, p)
    if not part:
        if saved is not None:
            log.add(name, LOW, "dropped", str(saved.dtype))
        return part
    ours = sharding.local(part[LOW].parts["data"])
    if saved is None:
        log.add(name, LOW, "reset", "nothing", str(ours.dtype))
        return part
    low = sharding.decode(saved, p).view(ours.shape).to(ours.device)
    if low.dtype == ours.dtype:
        ours.copy_(low)
        return part
    widening = ours.dtype == torch.int16
    wide = low.to(torch.int32)
    ours.copy_(wide << 8 if widening else ((wide + 128) >> 8).clamp(-128, 127))
    error = 0.0 if widening else relative_error(ours.to(torch.int32) << 8, wide)
    log.add(name, LOW, "encoded", str(low.dtype), str(ours.dtype), error)
    return part


def _low_bits(
    recipe: Recipe, p: Tensor, saved: object, group: Mapping[str, Any], log: ChangeLog
) -> dict[str, EncodedTensor]:
    """The low part of the master weight from FlashOptim's."""
    name, part = recipe.label, low_part(recipe, p)
    if not isinstance(saved, Tensor) or not has_data(saved):
        raise OptimizerError(f"{name}: {FLASH_LOW_BITS} is a tensor with data, found {type(saved).__name__}")
    if recipe.split is None:
        log.add(name, LOW, "dropped", FLASH_LOW_BITS)
        return part
    ours = sharding.local(part[LOW].parts["data"])
    ours.copy_(flashoptim.low_part(saved.to(p.device), p, recipe.split, group).view(ours.shape))
    log.add(name, LOW, "converted", FLASH_LOW_BITS, str(ours.dtype))
    return part


def _through_dense(
    recipe: Recipe,
    encoded: Mapping[str, EncodedTensor],
    p: Tensor,
    step: int,
    group: Group,
    saved: Mapping[str, Any],
    log: ChangeLog,
) -> dict[str, EncodedTensor] | None:
    """The method's states, encoded from dense ones; None if what is there does not suffice (then all start again)."""
    name = recipe.label
    dense, kinds = every_moment(decode_moments(encoded, p, step, saved), saved, group)
    if not dense.keys() >= recipe.specs.keys():
        return None
    moments, decoded = {}, {}
    for k, spec in recipe.specs.items():
        gain = low_rank_gain(spec.codec, step, group) if k == "exp_avg_sq" else 1.0
        x = (dense[k] / gain).to(device=sharding.local(p).device, dtype=spec.dtype)
        moments[k] = sharding.encode(spec.codec, x, spec.shape, p)
        decoded[k] = sharding.decode(moments[k], p) * gain
        source = format_codec(encoded[k].codec) if k in encoded else "momentum_buffer" if k == "exp_avg" else "exp_avg"
        log.add(name, k, kinds[k], source, format_codec(spec.codec), relative_error(decoded[k], dense[k].to(p.device)))
    if {"exp_avg", "exp_avg_sq"} <= recipe.specs.keys():
        directions = (update_direction(d["exp_avg"], d["exp_avg_sq"]) for d in (decoded, dense))
        log.update_rms[name] = relative_error(*directions)
    return moments
