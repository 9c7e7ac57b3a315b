"""Loads a state dict into an optimizer: which saved state belongs to which parameter, which options are taken over.

`adopting.py` then converts the states of each parameter.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from statecodec.errors import OptimizerError
from statecodec.names import bare_name
from statecodec.optim import flashoptim, sharding
from statecodec.optim.adopting import adopt
from statecodec.optim.agreement import on_all_ranks, ranks_agree
from statecodec.optim.load_report import ChangeLog, LoadReport
from statecodec.optim.method import Group
from statecodec.optim.options import without_numpy
from statecodec.optim.states import StateKeeper
from statecodec.optim.watched import Watched, WatchedStates

# Options of storage, which loading a checkpoint never changes.
STORAGE = frozenset((
    "algorithm", "moments", "master_weights", "dense_below", "level", "rank", "rules", "matrix", "variant", "base",
    "stochastic_rounding",
))  # fmt: skip
# What learning rate schedules add to a group. It does not apply to another kind of optimizer.
SCHEDULE = frozenset(("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"))
_WHOSE = ("params", "param_names")
_WHOLE = "Give all ranks the whole state"
_SHOWN = 8  # names in one message, at most


@dataclass(frozen=True)
class Match:
    """What is loaded into one group."""

    params: tuple[tuple[Any, Mapping[str, Any]] | None, ...]  # for each parameter its saved key and group, if any
    groups: tuple[Mapping[str, Any], ...]  # the saved groups of these parameters

    def options(self) -> tuple[dict[str, Any], list[str]]:
        """The options that all of the saved groups agree on, and the names of the others."""
        first, *rest = self.groups or ({},)
        options = {k: v for k, v in first.items() if k not in _WHOSE}
        split = [k for k, v in options.items() if not all(_same(v, g.get(k)) for g in rest)]
        return {k: v for k, v in options.items() if k not in split}, split


def load(optimizer: StateKeeper, state_dict: Mapping[str, Any]) -> LoadReport:
    """Replace the optimizer's state and group options; nothing changes if anything is wrong. Raises OptimizerError."""
    groups, log = optimizer.param_groups, ChangeLog()
    with on_all_ranks(optimizer.parameters(), f"another rank refused the state that it was given. {_WHOLE}"):
        saved_groups, saved_state = _checked(state_dict)
        matches = _matched(groups, saved_groups, log)
    _check_ranks(groups, matches, saved_state)
    shards = flashoptim.saved_shards(
        (p, saved_state[entry[0]])
        for group, match in zip(groups, matches, strict=True)
        for p, entry in zip(group["params"], match.params, strict=True)
        if entry is not None and saved_state.get(entry[0])
    )
    merged = [_merge(optimizer, g, m, log) for g, m in zip(groups, matches, strict=True)]
    states = WatchedStates(dict)
    used = set()
    for group, options, match in zip(groups, merged, matches, strict=True):
        for p, entry in zip(group["params"], match.params, strict=True):
            values = None if entry is None else saved_state.get(entry[0])
            if entry is None or not values:
                if saved_state and p.requires_grad:
                    log.add(optimizer.label(p), "all states", "missing", "nothing", "zeros")
                continue
            used.add(entry[0])
            recipe = optimizer.recipe(p, group)
            values = dict(flashoptim.dense_moments(values, recipe.label, p, shards))
            states[p] = Watched(adopt(recipe, p, {**group, **options}, values, entry[1], log))
    names = dict(zip((k for g in saved_groups for k in g["params"]), _names(saved_groups) or (), strict=False))
    for key in saved_state.keys() - used:
        if saved_state[key]:
            log.add(names.get(key, str(key)), "all states", "unused", "saved")
    if saved_state and not used and any(saved_state.values()):
        raise OptimizerError(
            f"none of the state's {len(saved_state)} entries is listed in its own groups: "
            f"it has {_few(saved_state)}, the groups {_few(k for g in saved_groups for k in g['params'])}"
        )
    for group, options in zip(groups, merged, strict=True):
        group.update(options)
    optimizer.state = states
    return log.report()


def _checked(state_dict: Mapping[str, Any]) -> tuple[list[Any], Mapping[Any, Any]]:
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    lists = isinstance(groups, list | tuple) and all(
        isinstance(g, Mapping) and isinstance(g.get("params"), list | tuple) for g in groups
    )
    if not lists or not isinstance(state, Mapping):
        raise OptimizerError("an optimizer state has `state` and `param_groups`, each group with `params`")
    for group in groups or ():
        _check_group(group)
    for key, values in state.items():
        if values is not None and not isinstance(values, Mapping):
            raise OptimizerError(f"state {str(key)[:60]}: expected values by name, found {type(values).__name__}")
    return list(groups or ()), state


def _check_ranks(groups: Sequence[Group], matches: Sequence[Match], state: Mapping[Any, Any]) -> None:
    """Raise OptimizerError, on all ranks, if ranks that share parameters are given different states."""
    pairs = [(p, e) for g, m in zip(groups, matches, strict=True) for p, e in zip(g["params"], m.params, strict=True)]
    states: dict[Any, list[str]] = defaultdict(list)
    asked: dict[Any, Tensor] = {}
    for p, entry in pairs:
        if sharding.is_dtensor(p):
            values = {} if entry is None else state.get(entry[0]) or {}
            mesh = sharding.mesh_of(p)
            asked.setdefault(mesh, p)
            states[mesh].append(" ".join(sorted(f"{k}={_kind(v)}" for k, v in values.items())))
    agreed = [ranks_agree(p, "; ".join(states[mesh])) for mesh, p in asked.items()]
    if not all(agreed):
        raise OptimizerError(
            "the ranks were given different states. A state that only rank 0 has, of another optimizer or with other "
            f"options, cannot be broadcast by torch (broadcast_from_rank0). {_WHOLE}"
        )


def _kind(value: Any) -> str:
    """The kind of a saved state, as text that is the same on every rank."""
    if isinstance(value, Tensor):
        return (
            f"{tuple(value.shape)} {'sharded' if sharding.is_dtensor(value) else 'whole'}" if value.ndim else "number"
        )
    return str(sorted(map(str, value))) if isinstance(value, Mapping) else type(value).__name__


def _check_group(group: Mapping[str, Any]) -> None:
    """Raise OptimizerError unless `params`, `param_names` and `algorithm` of a group have the right types."""
    if not all(isinstance(key, int | str) for key in group["params"]):
        raise OptimizerError("a group's `params` are positions or names")
    names = group.get("param_names")
    if not (names is None or (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names))):
        raise OptimizerError(f"a group's `param_names` are texts, found {str(names)[:80]}")
    if not isinstance(group.get("algorithm"), str | None):
        raise OptimizerError(f"a group's `algorithm` is a text, found {str(group['algorithm'])[:80]}")


# --- which state is for which parameter


def _matched(groups: Sequence[Group], saved: Sequence[Mapping[str, Any]], log: ChangeLog) -> list[Match]:
    """Match by position, as torch does; by name where both sides have names and their order differs."""
    ours, theirs = _names(groups), _names(saved)
    sizes, saved_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved]
    flat = [(key, g) for g in saved for key in g["params"]]
    places = dict(zip(theirs, flat, strict=True)) if theirs else {}
    shared = {name for name in ours or () if name in places}
    moved = sizes != saved_sizes or any(
        a != b for a, b in zip(ours or (), theirs or (), strict=False) if a in places or b in shared
    )
    if shared and moved:
        names = iter(ours or ())
        entries = [[places.get(name) for name in islice(names, n)] for n in sizes]
        return [Match(tuple(params), tuple({id(e[1]): e[1] for e in params if e}.values())) for params in entries]
    if sizes != saved_sizes:
        unnamed = "the optimizer's" if ours is None else "the state's" if theirs is None else "none of the"
        raise OptimizerError(
            f"the state has groups of {saved_sizes} parameters, the optimizer of {sizes}, and {unnamed} parameters "
            "have names to go by. Make the groups as they were when the state was saved (`optim.decay_groups` makes "
            "those of Hugging Face's Trainer), or give `named_parameters()` on both sides (`optim.with_names` adds "
            "them to a state)"
        )
    if ours and theirs and ours != theirs:
        renamed = [f"{b} into {a}" for a, b in zip(ours, theirs, strict=True) if a != b]
        log.notes.append(f"{len(renamed)} parameters are called otherwise; loaded by position: {_few(renamed)}")
    return [Match(tuple((key, g) for key in g["params"]), (g,)) for g in saved]


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The names of all parameters, in order; None if some have no name, or two the same."""
    names: list[str] = []
    for group in groups:
        params = group["params"]
        param_names = group.get("param_names") or (params if all(isinstance(p, str) for p in params) else ())
        if len(param_names) != len(params) or not all(isinstance(n, str) for n in param_names):
            return None
        names += map(bare_name, param_names)
    return names if len(set(names)) == len(names) else None


# --- which options


def own_settings(kind: type) -> str:
    """The note that another optimizer's hyperparameters were not taken over."""
    return f"lr and the other hyperparameters stay as {kind.__name__} was made with"


def _merge(optimizer: StateKeeper, group: Group, match: Match, log: ChangeLog) -> Group:
    """The options to use from now on: saved ones where they mean the same here, and what schedulers and users added.

    Nothing of them is shared with what was saved.
    """
    saved, split = match.options()
    if split:
        log.notes.append(f"saved groups with different {', '.join(split)} are one group here: it stays as it was made")
    algorithm = saved.get("algorithm")
    same = algorithm == optimizer.algorithm or (algorithm is None and optimizer.takes_torch_group(saved))
    if algorithm is None and same:
        saved = dict(optimizer.from_torch_group(saved))
    if saved and not same:
        source = f"a {algorithm} checkpoint" if algorithm else "a checkpoint of another optimizer"
        log.notes.append(f"{source}: {own_settings(type(optimizer))}")
        foreign = {*_option_names(), *SCHEDULE, *group}
    else:
        foreign = set(optimizer.torch_options) - set(optimizer.defaults)
    kept = foreign | (STORAGE & {*optimizer.defaults, "algorithm"})
    taken = {k: _copied(v, optimizer.defaults.get(k)) for k, v in saved.items() if k not in kept}
    merged = {**group, **taken}
    optimizer.accept_group(merged)
    return {k: v for k, v in merged.items() if k in taken or k not in group}


def _copied(value: Any, default: Any) -> Any:
    """A copy of an option, of the kind that its default is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    try:
        return tuple(value) if isinstance(value, list) and isinstance(default, tuple) else copy.deepcopy(value)
    except Exception as error:  # a group may hold values of any type
        raise OptimizerError(f"a group's option cannot be copied: {type(value).__name__}: {error}") from error


def _option_names() -> frozenset[str]:
    """Every option of every optimizer, torch's and ours, by their constructors."""
    classes = [c for c in vars(torch.optim).values() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]
    ours = list(StateKeeper.__subclasses__())
    for c in ours:
        ours += c.__subclasses__()
    return frozenset(name for c in (*classes, *ours) for name in inspect.signature(c).parameters)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(without_numpy(a) == without_numpy(b))


def _few(keys: Iterable[Any]) -> str:
    names = [str(k)[:60] for _, k in zip(range(_SHOWN), keys, strict=False)]
    return ", ".join(names) or "none"
