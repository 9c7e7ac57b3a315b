"""Turns one optimizer's state into another's.

The target optimizer converts it itself: parameters of the right names and shapes are made up from the file, the class
is constructed on them, loads the state it finds and gives its own. No model code is needed or run.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

from statecodec.atomic import AtomicOutput
from statecodec.checkpoint.left_out import tensor_bytes
from statecodec.checkpoint.open import loaded, open_checkpoint
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.spill import Releasing, Spill
from statecodec.codecs.plain import from_plain, is_plain
from statecodec.errors import UsageError
from statecodec.lazy import torch
from statecodec.optim import FOAM, AdamW, LoadReport, LoRAPre, SlimAdam, StateOptimizer
from statecodec.optim.adamw import Adam
from statecodec.optim.loading import own_settings
from statecodec.progress import Meter, Progress
from statecodec.verbs.convert_target import Target
from statecodec.verbs.inspect import inspect
from statecodec.verbs.quantised import LOW_BITS_ARE_LEFT_OUT, dense, has_low_bits, is_quantised, saved_shards
from statecodec.verbs.save import save

_OPTIMIZERS: dict[str, type[StateOptimizer]] = {"adamw": AdamW, "foam": FOAM, "slimadam": SlimAdam, "lorapre": LoRAPre}
_CLASSES: dict[str, type[StateOptimizer]] = {**_OPTIMIZERS, "adam": Adam}
_INDEX = re.compile(r"(?:^|\.)state\.(\d+)\.")
_MAX_DEPTH = 8


def convert_optimizers(
    src: Path, dst: Path, target: Target, pack: str, force: bool, progress: Progress | None = None
) -> Report:
    """Convert every optimizer in a checkpoint; the ending of `dst` chooses the kind of file. Raises as `convert` does.

    Large tensors lie on disk, in the folder of `dst`, and are converted one after the other. Memory is that of a few
    times the largest tensor, whatever the size of the checkpoint; a checkpoint that `save` wrote is loaded whole.
    """
    started = time.perf_counter()
    with Spill(dst.parent) as spill:
        with open_checkpoint(src) as checkpoint:
            value = loaded(checkpoint, torch.device("cpu"), spill)
        spill.release()
        paths = list(_optimizers(value, ()))
        if not paths:
            raise UsageError(f"{src}: no optimizer state in it (a dict with `state` and `param_groups`)")
        notes: list[str] = []
        errors: list[LoadReport] = []
        for path in paths:
            holder, saved = _at(value, path)
            converted, reports = _converted(saved, _names(src, path, saved), target, spill, progress)
            errors += reports
            lines = dict.fromkeys(line for report in reports for line in report.notes)
            if has_low_bits(saved["state"]):
                lines[LOW_BITS_ARE_LEFT_OUT] = None
            notes += [f"{'.'.join(map(str, path)) or src.name}: {line}" for line in lines]
            if holder is None:
                value = converted
            else:
                holder[path[-1]] = converted
        _write(value, dst, spill, pack, force, progress)
    return replace(_report(dst, errors, notes), seconds=time.perf_counter() - started)


def _write(value: Any, dst: Path, spill: Spill, pack: str, force: bool, progress: Progress | None) -> None:
    def released(done: int, total: int, stage: str) -> None:
        spill.release()
        if progress is not None:
            progress(done, total, stage)

    if dst.name.endswith(".safetensors"):
        save(value, dst, pack=pack, force=force, progress=released)
        return
    with AtomicOutput(dst, force=force) as output:
        with output.create() as file:
            torch.save(value, cast(IO[bytes], Releasing(file, spill)))
        output.publish()


def _converted(
    saved: Mapping[str, Any], names: Mapping[int, str], target: Target, spill: Spill, progress: Progress | None
) -> tuple[Any, list[LoadReport]]:
    """A state dict in the target's form, one parameter after the other, and what loading each lost."""
    algorithm = next((g.get("algorithm") for g in saved["param_groups"]), None)
    foreign = is_quantised(saved["state"])
    shards = saved_shards(saved["state"])
    kind = _OPTIMIZERS.get(target.name) or _CLASSES.get("adamw" if foreign else str(algorithm))
    if foreign and target.name == "torch":  # without encoding in between
        target = replace(target, options={"moments": "dense"})
    if kind is None and algorithm is None:
        raise UsageError("the state is torch.optim's already; `restore` or --layout torch gives a torch file of it")
    if kind is None:
        known = ", ".join(_CLASSES)
        raise UsageError(f"the state is that of {algorithm}, from which convert makes no dense one: it knows {known}")
    _refuse_settings(saved["param_groups"], target)
    idle = _idle_rules(kind, saved, names, target)
    meter = Meter(progress, sum(map(tensor_bytes, saved["state"].values())), "converting states")
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    reports: list[LoadReport] = []
    position = 0
    for group in saved["param_groups"]:
        parameters: dict[str, Any] = {}
        for index in range(len(group["params"])):
            alone = _alone(saved, group, index, shards)
            converted, report = _converted_one(kind, alone, names, target)
            reports.append(report)
            for values in converted["state"].values():
                state[position] = spill.keep_all(values)
            (options,) = converted["param_groups"]
            for key, value in options.items():  # all options of the group except which parameters it has
                if key in ("params", "param_names"):
                    parameters.setdefault(key, []).extend([position] if key == "params" else value)
                else:
                    parameters[key] = value
            position += 1
            spill.used(tensor_bytes(alone["state"]))
            meter.add(tensor_bytes(alone["state"]))
        groups.append(parameters or dict(group))
    if reports:
        reports[0] = replace(reports[0], notes=(*reports[0].notes, *idle))
    return {"state": state, "param_groups": groups}, reports


def _refuse_settings(groups: Sequence[Mapping[str, Any]], target: Target) -> None:
    """Raise UsageError for settings that have another meaning elsewhere, such as both eps of Adafactor."""
    for key in ("lr", "eps", "weight_decay"):
        value = next((g[key] for g in groups if isinstance(g.get(key), (list, tuple))), None)
        if value is not None:
            raise UsageError(f"{key} is {value} here, as in Adafactor: {target.name} cannot go on from such a state")


def _alone(saved: Mapping[str, Any], group: Mapping[str, Any], index: int, shards: int) -> dict[str, Any]:
    """The state dict of one parameter of a group, FlashOptim's being of as many shards."""
    key, names = group["params"][index], group.get("param_names") or []
    alone = {**group, "params": [key], **({"param_names": names[index : index + 1]} if names else {})}
    state = saved["state"].get(key)
    if is_quantised({key: state}):
        state = dense(state, shards)
    return {"state": {} if state is None else {key: state}, "param_groups": [alone]}


def _converted_one(
    kind: type[StateOptimizer], saved: dict[str, Any], names: Mapping[int, str], target: Target
) -> tuple[dict[str, Any], LoadReport]:
    """A state dict in the target's form, and what loading it lost."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rules that do not match this parameter: `_idle_rules` looks at all of them
        optimizer = _build(kind, saved, names, target.options)
    optimizer.load_state_dict(saved)
    report = optimizer.load_report
    notes = tuple(note for note in report.notes if own_settings(kind) not in note)  # it was made with the checkpoint's
    return optimizer.state_dict(dense=target.name == "torch"), replace(report, notes=notes)


def _idle_rules(
    kind: type[StateOptimizer], saved: Mapping[str, Any], names: Mapping[int, str], target: Target
) -> list[str]:
    """What the optimizer warns of when it is made for all parameters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _build(kind, saved, names, target.options, device="meta")
    return [str(w.message) for w in caught]


def _build(
    kind: type[StateOptimizer],
    saved: Mapping[str, Any],
    names: Mapping[int, str],
    options: Mapping[str, Any],
    device: str = "cpu",
) -> StateOptimizer:
    """The optimizer on made-up parameters of the checkpoint's names, shapes and groups."""
    groups = []
    storage = ("moments", "level", "rank", "rules", "variant", "dense_below", "base", "matrix")
    for group in saved["param_groups"]:
        params = []
        for position, index in enumerate(group["params"]):
            named = (group.get("param_names") or [])[position : position + 1]
            name = named[0] if named else names.get(index, f"param.{index}")
            shape = _shape(saved["state"].get(index, {}))
            weight = torch.zeros(shape, dtype=torch.float32, device=device)
            params.append((name, torch.nn.Parameter(weight, requires_grad=bool(saved["state"].get(index)))))
        kept = ("lr", "weight_decay", "betas", "eps", *(storage if group.get("algorithm") == kind.algorithm else ()))
        plain = {k: tuple(v) if k == "betas" else v for k in kept if (v := group.get(k)) is not None}
        groups.append({**plain, "params": params})
    try:
        return kind(groups, **options)
    except TypeError as error:
        raise UsageError(f"{kind.__name__} does not take these options: {error}") from error


def _shape(state: Mapping[str, Any]) -> tuple[int, ...]:
    for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        moment = state.get(name)
        if isinstance(moment, torch.Tensor):
            return tuple(moment.shape)
        if is_plain(moment):
            return from_plain(moment).shape  # type: ignore[arg-type]
    return (0,)  # never stepped: nothing to convert


def _optimizers(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Paths of the optimizer state dicts in a nested value."""
    if len(path) > _MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        if isinstance(value.get("state"), Mapping) and isinstance(value.get("param_groups"), list):
            yield path
            return
        for key, inner in value.items():
            yield from _optimizers(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _optimizers(inner, (*path, i))


def _at(value: Any, path: tuple[Any, ...]) -> tuple[MutableMapping[Any, Any] | None, Any]:
    holder = None
    for key in path:
        holder, value = value, value[key]
    return holder, value


def _names(src: Path, path: tuple[Any, ...], saved: Mapping[str, Any]) -> dict[int, str]:
    """Parameter names by index, where the layout could match them with weights for certain."""
    names: dict[int, str] = {}
    prefix = "".join(f"{key}." for key in path)
    with open_checkpoint(src) as checkpoint:
        for name in checkpoint.names():
            match = _INDEX.search(name)
            if match and name.rsplit(":", 1)[-1].startswith(prefix):
                param = checkpoint.info(name)["param"]
                if param:
                    names[int(match.group(1))] = param
    return names


def _report(dst: Path, errors: Sequence[LoadReport], notes: Sequence[str]) -> Report:
    """The written file, with the loss of each state as its tensor's error and the worst update error in total."""
    report = inspect(dst)
    changes = [c for e in errors for c in e.changes]
    lines = [f"{c.param}: {c.state} {c.kind}, {c.source} to {c.stored_as}" for c in changes if c.kind != "encoded"]
    states = [c for c in changes if c.relative_rms is not None]
    updates = {p: u for e in errors for p, u in e.update_rms.items()}
    total: dict[str, float] = {}
    for state in sorted({c.state for c in states}):
        total[f"{state}_worst_relative_rms"] = max(c.relative_rms or 0.0 for c in states if c.state == state)
    if updates:
        total["worst_update_error"] = max(updates.values())
    shown = lines[:20] + ([f"... and {len(lines) - 20} more"] if len(lines) > 20 else [])
    return replace(report, total=total or None, notes=(*report.notes, *notes, *shown))
