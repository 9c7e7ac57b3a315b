"""State dicts in every direction: our own bit for bit, torch.optim's, and from one method to another through the dense
form.

The dense form of a state is what torch.optim.AdamW or SGD would keep: `exp_avg`, `exp_avg_sq`, `momentum_buffer`, full
size. Folded states repeat, shared ones broadcast, low-rank ones multiply out. Going into a method's own encoding loses
what that encoding cannot hold; the LoadReport says how much, per tensor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from statecodec.codecs import Codec, EncodedTensor, LowRank, Raw, format_codec
from statecodec.codecs.plain import from_plain, is_plain, to_plain
from statecodec.errors import OptimizerError
from statecodec.optim.method import Group, Plan, StateSpec

if TYPE_CHECKING:
    from statecodec.optim.base import StateOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
# Group options that say how states are stored or who they belong to: a checkpoint never overrides the constructor's.
STORAGE = frozenset((
    "params", "param_names", "algorithm", "moments", "master_weights", "dense_below", "level", "rank", "rules",
    "matrix", "variant", "base", "stochastic_rounding",
))  # fmt: skip


@dataclass(frozen=True)
class StateChange:
    """What became of one state while loading: `encoded`, `converted` (from another state), `reset` or `dropped`."""

    param: str | int
    state: str
    kind: str
    source: str
    stored_as: str
    relative_rms: float | None = None  # ||loaded - saved|| / ||saved||; None where there is nothing to compare


@dataclass(frozen=True)
class LoadReport:
    """What load_state_dict changed; empty if every state went in bit for bit."""

    changes: tuple[StateChange, ...] = ()
    notes: tuple[str, ...] = ()
    # Error of the Adam direction m / sqrt(v), by parameter.
    update_rms: Mapping[str | int, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether training continues with the same numbers."""
        return all(c.kind == "encoded" and c.relative_rms == 0 for c in self.changes)

    def __str__(self) -> str:
        lines = list(self.notes)
        for c in self.changes:
            loss = "" if c.relative_rms is None else f", relative rms error {c.relative_rms:.2e}"
            lines.append(f"{c.param}: {c.state} {c.kind} ({c.source} -> {c.stored_as}{loss})")
        lines += [f"{p}: error of the Adam update {e:.2e}" for p, e in self.update_rms.items()]
        return "\n".join(lines) or "every state loaded bit for bit"


# --- out


def plain_states(optimizer: StateOptimizer) -> defaultdict[Tensor, Any]:
    """The live state with every encoded tensor in its plain form (parts shared, not copied)."""
    packed: defaultdict[Tensor, Any] = defaultdict(dict)
    for p, state in optimizer.state.items():
        packed[p] = {k: to_plain(v) if isinstance(v, EncodedTensor) else v for k, v in state.items()}
    return packed


def dense_states(optimizer: StateOptimizer) -> defaultdict[Tensor, Any]:
    """torch.optim's state: `step` (fp32 on the CPU) and the decoded moments."""
    packed: defaultdict[Tensor, Any] = defaultdict(dict)
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state:
                continue
            moments = {k: v for k, v in state.items() if k in MOMENTS}
            dense = decode_moments(moments, tuple(p.shape), int(state["step"]), group)
            packed[p] = {"step": torch.tensor(float(state["step"])), **dense}
    return packed


def torch_group(optimizer: StateOptimizer, group: Group) -> Group:
    """The group with the options of the torch class, and nothing that only we know."""
    shared = ("params", "param_names", "lr", "initial_lr", "weight_decay", "maximize", *optimizer.torch_options)
    return {**optimizer.torch_options, **{k: group[k] for k in shared if k in group}}


def decode_moments(
    moments: Mapping[str, EncodedTensor], shape: tuple[int, ...], step: int, group: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Dense moments of one parameter, in its shape."""
    dense = {}
    for name, encoded in moments.items():
        x = encoded.decode().view(shape)
        dense[name] = x.mul_(_low_rank_gain(encoded.codec, step, group)) if name == "exp_avg_sq" else x
    return dense


def _low_rank_gain(codec: Codec, step: int, group: Mapping[str, Any]) -> float:
    """A low-rank second moment is (EMA of |g| with sqrt(beta2))**2: its start-up bias is not the one Adam divides
    out."""
    if not (isinstance(codec, LowRank) and codec.form == "square") or step < 1:
        return 1.0
    beta2 = float(group.get("betas", (0.9, 0.999))[1])
    return float((1 - beta2**step) / (1 - beta2 ** (step / 2)) ** 2)


# --- in


def load(optimizer: StateOptimizer, state_dict: Mapping[str, Any]) -> LoadReport:
    """Replace the optimizer's state and group options; nothing changes if anything is wrong."""
    saved_groups, saved_state = _checked(state_dict)
    groups = optimizer.param_groups
    sizes, found = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved_groups]
    if sizes != found:
        raise OptimizerError(f"the state has groups of {found} parameters, the optimizer of {sizes}")
    log = _Log()
    merged = [_merge(optimizer, g, s, log) for g, s in zip(groups, saved_groups, strict=True)]
    states: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for group, new, saved in zip(groups, merged, saved_groups, strict=True):
        for p, key in zip(group["params"], saved["params"], strict=True):
            if saved_state.get(key):
                states[p] = _load_param(optimizer, p, {**new, "params": group["params"]}, saved_state[key], saved, log)
    for group, new in zip(groups, merged, strict=True):
        group.update(new)
    optimizer.state = states
    return LoadReport(tuple(log.changes), tuple(dict.fromkeys(log.notes)), log.update_rms)


class _Log:
    def __init__(self) -> None:
        self.changes: list[StateChange] = []
        self.notes: list[str] = []
        self.update_rms: dict[str | int, float] = {}


def _checked(state_dict: Mapping[str, Any]) -> tuple[list[Any], Mapping[Any, Any]]:
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    lists = isinstance(groups, list | tuple) and all(
        isinstance(g, Mapping) and isinstance(g.get("params"), list | tuple) for g in groups
    )
    if not lists or not isinstance(state, Mapping):
        raise OptimizerError("an optimizer state has `state` and `param_groups`, each group with `params`")
    return list(groups or ()), state


def _merge(optimizer: StateOptimizer, group: Group, saved: Mapping[str, Any], log: _Log) -> Group:
    """The options to use from now on: saved ones where they mean the same here."""
    algorithm = saved.get("algorithm")
    same = algorithm == optimizer.algorithm or (algorithm is None and optimizer.takes_torch_group(saved))
    if not same:
        source = f"a {algorithm} checkpoint" if algorithm else "a checkpoint of another optimizer"
        log.notes.append(f"{source}: lr and the other hyperparameters stay as {type(optimizer).__name__} was made with")
        return {}
    known = {*optimizer.defaults, "initial_lr"} - STORAGE
    new = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known}
    optimizer.check_group({**group, **new})
    return new


def _load_param(
    optimizer: StateOptimizer, p: Tensor, new: Group, values: Mapping[str, Any], saved: Mapping[str, Any], log: _Log
) -> dict[str, Any]:
    group = {**next(g for g in optimizer.param_groups if g["params"] is new["params"]), **new}
    plan = optimizer.plan(p, group)
    name = plan.name or plan.index
    found = {k: _encoded(v, name, k, p) for k, v in values.items() if k in (*MOMENTS, "weight_low")}
    state = optimizer.fresh_state(p, group)
    # torch.optim.SGD counts no steps; a buffer that exists has seen one.
    state["step"].fill_(_counter(values.get("step", 1 if found else 0), name, "step"))
    state["skipped"].fill_(_counter(values.get("skipped", 0), name, "skipped"))
    if "max_exp_avg_sq" in values:
        log.changes.append(StateChange(name, "max_exp_avg_sq", "dropped", "amsgrad", "nothing"))
    _load_low(state, found.pop("weight_low", None), name, log)
    if all(k in found and _fits(found[k], s) for k, s in plan.specs.items()):
        for k in found.keys() - plan.specs.keys():
            log.changes.append(StateChange(name, k, "dropped", format_codec(found[k].codec), "nothing"))
        return {**state, **{k: _copy(found[k], p.device) for k in plan.specs}}
    moments = _through_dense(plan, found, p, state, group, saved, log)
    if moments is None:
        state["step"].zero_()
        moments = plan.method.init(p, plan, group)
        source = ", ".join(found) or "nothing"
        log.changes.extend(StateChange(name, k, "reset", source, format_codec(s.codec)) for k, s in plan.specs.items())
    return {**state, **moments}


def _counter(value: object, name: str | int, key: str) -> float:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, int | float) or not 0 <= number < 2**53:
        raise OptimizerError(f"{name}: {key} is a number of steps, found {str(value)[:80]}")
    return float(number)


def _encoded(value: object, name: str | int, state: str, p: Tensor) -> EncodedTensor:
    """A saved state, whichever form it is in, of the parameter's size."""
    if isinstance(value, Tensor):
        value = EncodedTensor(Raw(), tuple(value.shape), value.dtype, {"data": value.detach()})
    elif is_plain(value):
        value = from_plain(value)  # type: ignore[arg-type]
    if not isinstance(value, EncodedTensor):
        raise OptimizerError(f"{name}: {state} is a tensor or an encoded tensor, found {type(value).__name__}")
    if math.prod(value.shape) != p.numel():
        raise OptimizerError(f"{name}: {state} has shape {value.shape}, the parameter {tuple(p.shape)}")
    return value


def _fits(encoded: EncodedTensor, spec: StateSpec) -> bool:
    return encoded.codec == spec.codec and encoded.shape == spec.shape and encoded.dtype == spec.dtype


def _copy(encoded: EncodedTensor, device: torch.device) -> EncodedTensor:
    parts = {k: t.detach().to(device, copy=True).contiguous() for k, t in encoded.parts.items()}
    return EncodedTensor(encoded.codec, encoded.shape, encoded.dtype, parts)


def _load_low(state: dict[str, Any], saved: EncodedTensor | None, name: str | int, log: _Log) -> None:
    """The low part of the master weight; widths convert, 16 to 8 bits by rounding."""
    if "weight_low" not in state:
        if saved is not None:
            log.changes.append(StateChange(name, "weight_low", "dropped", str(saved.dtype), "nothing"))
        return
    ours: Tensor = state["weight_low"].parts["data"]
    if saved is None:
        log.changes.append(StateChange(name, "weight_low", "reset", "nothing", str(ours.dtype)))
        return
    low = saved.decode().view(ours.shape).to(ours.device)
    if low.dtype == ours.dtype:
        ours.copy_(low)
        return
    if {low.dtype, ours.dtype} != {torch.int8, torch.int16}:
        raise OptimizerError(f"{name}: weight_low is int8 or int16, found {low.dtype}")
    widening = ours.dtype == torch.int16
    wide = low.to(torch.int32)
    converted = wide << 8 if widening else ((wide + 128) >> 8).clamp(-128, 127)
    ours.copy_(converted)
    error = 0.0 if widening else _relative(ours.to(torch.int32) << 8, wide)
    log.changes.append(StateChange(name, "weight_low", "encoded", str(low.dtype), str(ours.dtype), error))


def _through_dense(
    plan: Plan, found: Mapping[str, EncodedTensor], p: Tensor, state: dict[str, Any], group: Group,
    saved: Mapping[str, Any], log: _Log,
) -> dict[str, EncodedTensor] | None:  # fmt: skip
    """The method's states, encoded from dense ones; None if what is there does not suffice (then all start again)."""
    step, name = int(state["step"]), plan.name or plan.index
    dense, kinds = _every_moment(decode_moments(found, tuple(p.shape), step, saved), saved, group)
    if not dense.keys() >= plan.specs.keys():
        return None
    for k in found.keys() - plan.specs.keys():
        log.changes.append(StateChange(name, k, "dropped", format_codec(found[k].codec), "nothing"))
    moments, decoded = {}, {}
    for k, spec in plan.specs.items():
        gain = _low_rank_gain(spec.codec, step, group) if k == "exp_avg_sq" else 1.0
        x = (dense[k] / gain).to(device=p.device, dtype=spec.dtype).reshape(spec.shape)
        moments[k] = spec.codec.encode(x)
        decoded[k] = moments[k].decode().view(p.shape) * gain
        source = format_codec(found[k].codec) if k in found else "momentum_buffer" if k == "exp_avg" else "exp_avg"
        error = _relative(decoded[k], dense[k].to(p.device))
        log.changes.append(StateChange(name, k, kinds[k], source, format_codec(spec.codec), error))
    if {"exp_avg", "exp_avg_sq"} <= plan.specs.keys():
        log.update_rms[name] = _relative(*(_direction(d["exp_avg"], d["exp_avg_sq"]) for d in (decoded, dense)))
    return moments


def _every_moment(
    dense: dict[str, Tensor], saved: Mapping[str, Any], group: Group
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Dense moments with the average and the momentum buffer derived from each other; and how each was come by."""
    kinds = dict.fromkeys(dense, "encoded")
    theirs, ours = _buffer_gain(saved), _buffer_gain(group)
    if "momentum_buffer" in dense:
        buffer = dense["momentum_buffer"]
        if "exp_avg" not in dense:
            dense["exp_avg"], kinds["exp_avg"] = buffer / theirs, "converted"
        if theirs != ours:
            dense["momentum_buffer"], kinds["momentum_buffer"] = buffer * (ours / theirs), "converted"
    elif "exp_avg" in dense:
        dense["momentum_buffer"], kinds["momentum_buffer"] = dense["exp_avg"] * ours, "converted"
    return dense, kinds


def _buffer_gain(group: Mapping[str, Any]) -> float:
    """What a momentum buffer is of the exponential average: SGD sums, Muon (torch's and ours) averages."""
    if group.get("algorithm") == "muon" or ("ns_steps" in group and group.get("algorithm") != "lorapre"):
        return 1.0
    momentum = float(group.get("momentum", group.get("betas", (0.9,))[0]))
    return (1 - float(group.get("dampening", 0.0))) / max(1 - momentum, 1e-8)


def _direction(m: Tensor, v: Tensor) -> Tensor:
    return m.to(torch.float64) / (v.to(torch.float64).sqrt() + 1e-30)


def _relative(found: Tensor, exact: Tensor) -> float:
    exact = exact.to(device=found.device, dtype=torch.float64)
    difference = torch.linalg.vector_norm(found.to(torch.float64) - exact)
    return float(difference / torch.linalg.vector_norm(exact).clamp(min=1e-300)) if exact.numel() else 0.0
