"""Finds the weight that an optimizer's parameter number i belongs to, by shapes; the answer may be "unknown".

An optimizer's groups list parameters in the model's order, but each group takes only some of them (decay and no-decay
groups, frozen layers). A match is accepted only when there is exactly one way to deal the weights out to the groups.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

Shape = tuple[int, ...]
_MAX_WORK: Final = 1_000_000


def deal(weights: Sequence[Shape], groups: Sequence[Sequence[Shape | None]]) -> list[list[int]] | None:
    """For each group its weights' indices, if there is exactly one way; None if there is none or more than one.

    `weights` are in the model's order; each group is a subsequence of them, no weight is in two groups, and weights may
    be left over. A shape of None (a parameter that has no state yet) fits every weight.
    """
    spare = len(weights) - sum(len(g) for g in groups)
    if spare < 0:
        return None
    start = (0,) * len(groups)
    # Per number of weights dealt: positions in the groups -> (ways to get there, positions before, group of the last).
    layers: list[dict[Shape, tuple[int, Shape, int]]] = [{start: (1, start, -1)}]
    work = 0
    for i, shape in enumerate(weights):
        work += len(layers[-1]) * (1 + len(groups))
        if work > _MAX_WORK:
            return None
        following: dict[Shape, tuple[int, Shape, int]] = {}
        for at, (ways, _, _) in layers[-1].items():
            moves = [(at, -1)] if i - sum(at) < spare else []
            for g, group in enumerate(groups):
                if at[g] < len(group) and group[at[g]] in (None, shape):
                    moves.append(((*at[:g], at[g] + 1, *at[g + 1 :]), g))
            for to, g in moves:
                before = following.get(to)
                following[to] = (ways, at, g) if before is None else (2, at, g)  # 2: more than one
        if not following:
            return None
        layers.append(following)
    end = tuple(len(g) for g in groups)
    if end not in layers[-1] or layers[-1][end][0] != 1:
        return None
    dealt: list[list[int]] = [[] for _ in groups]
    at = end
    for i in range(len(weights) - 1, -1, -1):
        _, at, g = layers[i + 1][at]
        if g >= 0:
            dealt[g].append(i)
    return [indices[::-1] for indices in dealt]


def deal_by_shape(
    weights: Sequence[tuple[str, Shape]], groups: Sequence[Sequence[Shape | None]], *, layers: bool
) -> dict[tuple[int, int], int]:
    """(group, position) -> weight index, wherever shapes settle it; `weights` are (name, shape) in no useful order.

    safetensors files are sorted by name, so the model's order is lost. What is certain without it: a shape that one
    weight and one parameter have; and, with `layers`, a shape that only the same weight of repeated layers has
    (`h.#.mlp.c_fc.weight`), in the order of the layers' numbers, if one group holds them all and layer follows layer.
    """
    if any(shape is None for group in groups for shape in group):
        return {}
    wanted: dict[Shape, list[tuple[int, int]]] = defaultdict(list)
    for g, group in enumerate(groups):
        for i, shape in enumerate(group):
            wanted[shape or ()].append((g, i))
    there: dict[Shape, list[int]] = defaultdict(list)
    for w, (_, shape) in enumerate(weights):
        there[shape].append(w)
    certain: dict[tuple[int, int], int] = {}
    layered: dict[tuple[int, int], int] = {}
    for shape, places in wanted.items():
        candidates = there.get(shape, [])
        if len(candidates) != len(places) or len({g for g, _ in places}) != 1:
            continue
        if len(candidates) == 1:
            certain[places[0]] = candidates[0]
        elif layers and len({re.sub(r"\d+", "#", weights[w][0]) for w in candidates}) == 1:
            candidates.sort(key=lambda w: _numbers(weights[w][0]))
            layered.update(zip(places, candidates, strict=True))
    return certain | layered if _layer_by_layer([(g, i, weights[w][0]) for (g, i), w in layered.items()]) else certain


def _numbers(name: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d{1,18}", name)]


def _layer_by_layer(places: list[tuple[int, int, str]]) -> bool:
    """Whether each group holds layer after layer, all of one length; `places` are (group, position, name)."""
    starts: dict[tuple[int, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for group, position, name in sorted(places):
        stack, _, kind = re.sub(r"\d+", "#", name).partition("#")
        starts[group, stack][kind].append(position)
    for kinds in starts.values():
        lengths = {b - a for positions in kinds.values() for a, b in pairwise(positions)}
        firsts = [positions[0] for positions in kinds.values()]
        if len(lengths) != 1 or max(firsts) - min(firsts) >= lengths.pop():
            return False
    return True
