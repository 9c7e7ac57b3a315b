"""What a budget bounds: options that would bound nothing are refused, and what became of its promise is counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container

from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.choose.budget import Budget
from statecodec.choose.choices import Choice, Choices
from statecodec.choose.presets import is_small
from statecodec.choose.shortfalls import Kept, Shortfall, Tally, Why
from statecodec.codecs import Dropped, Logarithmic
from statecodec.codecs.base import FLOATS
from statecodec.dtypes import FLOAT32
from statecodec.errors import UsageError
from statecodec.roles import MOMENT_ROLES, family


def has_grid(item: SourceItem) -> bool:
    """Whether a tensor may have an error at all: a large one of floats."""
    return item.dtype in FLOATS and not item.bytes_only and not is_small(item.shape)


def is_open(choice: Choice) -> bool:
    """Whether a budget may decide about a tensor: no rule of the caller did, and it is not dropped."""
    return not choice.settled and not isinstance(choice.codec, Dropped)


def require_something(source: SourceCheckpoint, choices: Choices, budget: Budget) -> None:
    """Raise UsageError if an option of a budget is about no tensor, or the choices so far leave it none."""
    bounds = {
        "max_update_error": ("optimizer states", MOMENT_ROLES),
        "max_weight_error": ("weights", ("weight",)),
        "max_step_error": ("weights and optimizer states", ("weight", *MOMENT_ROLES)),
    }
    roles = {family(item.role) for item in source.items if item.dtype in FLOATS}
    left, settled = set[str](), set[str]()
    for item in source.items:
        role = family(item.role)
        if has_grid(item) and (role != "weight" or item.dtype == FLOAT32):
            (left if is_open(choices[item.name]) else settled).add(role)
    for name in budget.asked:
        tensors, needed = bounds[name]
        if roles.isdisjoint(needed):
            raise UsageError(f"{name}: no {tensors} are known in {source.path}, so there is nothing to bound")
        if left.isdisjoint(needed) and not settled.isdisjoint(needed):
            raise UsageError(
                f"{name}: the rules and the preset leave no {tensors} of {source.path} to bound: all are dropped, or a "
                "rule says how they are stored"
            )


def kept(source: SourceCheckpoint, choices: Choices, only: Container[str] | None) -> Kept:
    """What choices that are final keep of the promise of a budget, for the tensors in `only` or all."""
    # A second moment is a part of the update also where a rule of the caller says how the first one is stored.
    beside, bounded = {m.exp_avg_sq for m in source.moments if choices[m.exp_avg].settled}, set[str]()
    found: dict[Why, list[tuple[str, Shortfall]]] = defaultdict(list)
    for item in source.items:
        if only is not None and item.name not in only:
            continue
        choice = choices[item.name]
        if not choice.settled and (choice.unit or (item.name in beside and isinstance(choice.codec, Logarithmic))):
            bounded.add("weight_step_error" if family(item.role) == "weight" else "u_rms")
        is_exact_copy = choice.codec.repeats and choices[choice.companions["original"]].exact
        if choice.shortfall is not None and not is_exact_copy:
            found[choice.shortfall.why].append((item.name, choice.shortfall))
    return Kept(frozenset(bounded), {why: Tally.of(these) for why, these in found.items()})
