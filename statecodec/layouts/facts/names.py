"""Names the parameters of optimizers: as the file says, or by matching shapes with the weights that may be meant."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

from statecodec.layouts.facts.match import Shape, deal, deal_by_shape
from statecodec.layouts.facts.survey import Optimizer, Weight

_STRANGERS: Final = 4  # parameters that fit, at least, for each one that does not


@dataclass
class Candidate:
    """The weights that an optimizer may be about; ties counted once."""

    weights: list[Weight]
    ordered: bool

    def names(self) -> list[str]:
        return [w.name for w in self.weights]

    def shapes(self) -> list[Shape]:
        return [w.node.shape for w in self.weights]


def models(weights: list[Weight], ordered: bool) -> list[Candidate]:
    """The models of one file. Tied weights count once, under their first name, as in Module.parameters()."""
    models: dict[str, list[Weight]] = defaultdict(list)
    seen: set[tuple[str, str, int]] = set()
    for weight in weights:
        tie = (weight.top, weight.node.storage.key, weight.node.offset)
        if math.prod(weight.node.shape) and tie not in seen:
            seen.add(tie)
            models[weight.top].append(weight)
    return [Candidate(model, ordered) for model in models.values()]


def name_all(optimizers: list[Optimizer], scopes: list[list[Candidate]]) -> list[list[list[str | None]]]:
    """For each optimizer, for each group, the parameters' names; None where they are not certain."""
    named: list[list[list[str | None]] | None] = [_given_names(o) for o in optimizers]
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


def _given_names(optimizer: Optimizer) -> list[list[str | None]] | None:
    return [g.names for g in optimizer.groups] if any(any(g.names) for g in optimizer.groups) else None


def _agreed(answers: list[list[list[str | None]] | None]) -> list[list[str | None]] | None:
    """The one answer that all candidates that have one give (a model and its EMA agree)."""
    given = [a for a in answers if a is not None]
    return given[0] if given and all(a == given[0] for a in given) else None


def _match_ordered(candidate: Candidate, optimizers: list[Optimizer], *, exact: bool) -> list[list[str | None]] | None:
    groups = [shapes for o in optimizers for shapes in o.shapes()]
    total = sum(len(g) for g in groups)
    if not candidate.ordered or not total or (exact and total != len(candidate.weights)):
        return None
    if all(shape is None for group in groups for shape in group):
        return None
    names = candidate.names()
    dealt = deal(candidate.shapes(), groups)
    if dealt is not None:
        return [[names[w] for w in group] for group in dealt]
    return None if exact else _without_strangers(candidate, groups)


def _without_strangers(candidate: Candidate, groups: list[list[Shape | None]]) -> list[list[str | None]] | None:
    """The same without the few parameters that have no state, or a shape that no weight has: they stay anonymous."""
    known = set(candidate.shapes())
    fitting = [[i for i, shape in enumerate(group) if shape in known] for group in groups]
    count, total = sum(map(len, fitting)), sum(map(len, groups))
    if count == total or (total - count) * _STRANGERS > count:
        return None
    dealt = deal(candidate.shapes(), [[g[i] for i in kept] for g, kept in zip(groups, fitting, strict=True)])
    if dealt is None:
        return None
    found: list[list[str | None]] = [[None] * len(group) for group in groups]
    for names, kept, weights in zip(found, fitting, dealt, strict=True):
        for i, w in zip(kept, weights, strict=True):
            names[i] = candidate.weights[w].name
    return found


def _match_shapes(candidate: Candidate, optimizer: Optimizer) -> list[list[str | None]] | None:
    groups = optimizer.shapes()
    if sum(len(g) for g in groups) > len(candidate.weights):
        return None
    pairs = list(zip(candidate.names(), candidate.shapes(), strict=True))
    # Where the order is known and did not fit, it cannot be leant on.
    found = deal_by_shape(pairs, groups, layers=not candidate.ordered)
    if not found:
        return None
    return [
        [pairs[found[g, i]][0] if (g, i) in found else None for i in range(len(group))]
        for g, group in enumerate(groups)
    ]
