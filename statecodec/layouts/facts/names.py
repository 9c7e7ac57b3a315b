"""Names the parameters of optimizers: by names in the file, or by matching shapes with the weights in question."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, TypeAlias

from statecodec.layouts.facts.conventions import usual_division
from statecodec.layouts.facts.match import Shape, deal, deal_by_shape
from statecodec.layouts.facts.orders import known_orders
from statecodec.layouts.facts.survey import ModelTensor, Optimizer

Dealt: TypeAlias = "list[list[str | None]]"
"""For each group of an optimizer the names of its parameters."""

_STRANGERS: Final = 4  # parameters that fit, at least, for each one that does not


@dataclass
class Candidate:
    """The weights that an optimizer may be for; tied ones counted once."""

    weights: list[ModelTensor]
    ordered: bool
    """They stand in the model's order."""

    well_known: bool = False
    """The order is that of a well-known architecture."""

    @cached_property
    def orders(self) -> list[Candidate]:
        """The same weights in each order that the model may have; none where no order is known."""
        names = self.names()
        if self.ordered and names != sorted(names):
            return [self]
        orders = known_orders(names)
        if self.ordered and not orders and not _biases_come_first(names):
            return [self]
        return [Candidate([self.weights[i] for i in order], True, True) for order in orders]

    def names(self) -> list[str]:
        """Their names."""
        return [w.name for w in self.weights]

    def shapes(self) -> list[Shape]:
        """Their shapes."""
        return [w.node.shape for w in self.weights]


def models(weights: list[ModelTensor], ordered: bool) -> list[Candidate]:
    """The models of one file. Tied weights count once, under their first name, as in Module.parameters()."""
    models: dict[str, list[ModelTensor]] = defaultdict(list)
    seen: set[tuple[str, str, int]] = set()
    for weight in weights:
        tie = (weight.top, weight.node.storage.key, weight.node.offset)
        if math.prod(weight.node.shape) and tie not in seen:
            seen.add(tie)
            models[weight.top].append(weight)
    return [Candidate(model, ordered) for model in models.values()]


def name_all(optimizers: list[Optimizer], scopes: list[list[Candidate]]) -> list[Dealt]:
    """For each optimizer, for each group, the parameters' names; None where they are not certain."""
    named: list[Dealt | None] = [_given_names(o) for o in optimizers]
    for scope in scopes:
        open_ones = [i for i, n in enumerate(named) if n is None]
        for i in open_ones:
            named[i] = _agreed([_match_ordered(c, [optimizers[i]], exact=True) for c in scope])
        open_ones = [i for i in open_ones if named[i] is None]
        together = _agreed([_match_ordered(c, [optimizers[i] for i in open_ones], exact=True) for c in scope])
        if together is not None:
            for i in open_ones:
                named[i], together = together[: len(optimizers[i].groups)], together[len(optimizers[i].groups) :]
            continue
        for i in open_ones:
            named[i] = _agreed([_match_ordered(c, [optimizers[i]], exact=False) for c in scope])
    for scope in scopes:
        for i, optimizer in enumerate(optimizers):
            if named[i] is None:
                named[i] = _agreed([_match_shapes(c, optimizer) for c in scope])
    return [n or [[None] * len(g.ids) for g in o.groups] for n, o in zip(named, optimizers, strict=True)]


def _given_names(optimizer: Optimizer) -> Dealt | None:
    return [g.names for g in optimizer.groups] if any(any(g.names) for g in optimizer.groups) else None


def _agreed(answers: Iterable[Dealt | None]) -> Dealt | None:
    """The names that all answers agree on: a model and its EMA agree; two orders agree in part."""
    named = [a for a in answers if a is not None]
    if not named:
        return None
    agreed = [
        [names[0] if names.count(names[0]) == len(names) else None for names in zip(*groups, strict=True)]
        for groups in zip(*named, strict=True)
    ]
    return agreed if any(map(any, agreed)) else None


def _match_ordered(candidate: Candidate, optimizers: list[Optimizer], *, exact: bool) -> Dealt | None:
    groups = [shapes for o in optimizers for shapes in o.shapes()]
    total = sum(len(g) for g in groups)
    if not total or (exact and total != len(candidate.weights)):
        return None
    if all(shape is None for group in groups for shape in group):
        return None
    decays = [group.node.get("weight_decay") for o in optimizers for group in o.groups]
    return _agreed(_match_order(order, groups, decays, exact=exact) for order in candidate.orders)


def _match_order(
    candidate: Candidate, groups: list[list[Shape | None]], decays: list[Any], *, exact: bool
) -> Dealt | None:
    names, shapes = candidate.names(), candidate.shapes()
    dealt = deal(shapes, groups)
    if dealt is None and exact and candidate.well_known:
        dealt = usual_division(names, shapes, groups, decays)
    if dealt is not None:
        return [[names[w] for w in group] for group in dealt]
    return None if exact else _without_strangers(candidate, groups)


def _biases_come_first(names: list[str]) -> bool:
    """Whether the names are sorted alphabetically: in a model, modules have their weight before their bias."""
    return any(a.rpartition(".")[0] + ".weight" == b and a.endswith(".bias") for a, b in pairwise(names))


def _without_strangers(candidate: Candidate, groups: list[list[Shape | None]]) -> Dealt | None:
    """The same without the few parameters that have no state, or a shape that no weight has: they get no names."""
    shapes = set(candidate.shapes())
    fitting = [[i for i, shape in enumerate(group) if shape in shapes] for group in groups]
    count, total = sum(map(len, fitting)), sum(map(len, groups))
    if count == total or (total - count) * _STRANGERS > count:
        return None
    dealt = deal(candidate.shapes(), [[g[i] for i in kept] for g, kept in zip(groups, fitting, strict=True)])
    if dealt is None:
        return None
    dealt_names: list[list[str | None]] = [[None] * len(group) for group in groups]
    for names, kept, weights in zip(dealt_names, fitting, dealt, strict=True):
        for i, w in zip(kept, weights, strict=True):
            names[i] = candidate.weights[w].name
    return dealt_names


def _match_shapes(candidate: Candidate, optimizer: Optimizer) -> Dealt | None:
    groups = optimizer.shapes()
    if sum(len(g) for g in groups) > len(candidate.weights):
        return None
    pairs = list(zip(candidate.names(), candidate.shapes(), strict=True))
    # Where the order is known and did not fit, it cannot be used.
    matched = deal_by_shape(pairs, groups, layers=not candidate.orders)
    if not matched:
        return None
    return [
        [pairs[matched[g, i]][0] if (g, i) in matched else None for i in range(len(group))]
        for g, group in enumerate(groups)
    ]
