"""A rate-distortion allocation: the cheapest codec for each tensor such that the error of the whole stays under a
budget.

Each tensor offers options (codec, bytes, squared error). Only those on the lower convex hull of its bytes over error
are worth taking, and the best allocation for any budget takes the hulls' segments in the order of bytes saved per error
caused (Shoham and Gersho 1988): that order is the whole curve of size against error, and a budget is a point on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from statecodec import codecs
from statecodec.codecs import Codec

_FIRST = (
    "split", "cast", *(f"companded(group={g})" for g in (32, 128)),
    *(f"companded(curve={c},top={t},group={g})"
      for c in ("softsign", "linear") for t in (90, 63, 45, 31, 21, 15, 10, 7, 5, 3, 2, 1) for g in (32, 128)),
    *(f"companded(curve=linear,top={t},group=1024)" for t in (5, 3, 2, 1)),  # most codes are 0: as good as pruned
    *(f"companded(curve=softsign,bits=4,group={g})" for g in (32, 128)),
)  # fmt: skip
_SECOND = (
    "split", "cast", *(f"companded(curve=sqrt,group={g})" for g in (32, 128)),
    *(f"companded(curve=sqrt,top={t},group=128)" for t in (180, 127, 90, 63, 31)),
    *(f"companded(curve=log,steps={s},group={g})" for s in (48, 32, 24, 20, 16, 12, 10, 8, 6, 5, 4, 3)
      for g in (128, 1024)),
    *(f"companded(curve=log,steps={s},top={s * 40},group={g})" for s in (2, 1) for g in (128, 1024)),
    *(f"companded(curve=log,bits=4,steps={s},group={g})" for s in (1, 2, 3) for g in (32, 128)),
    *(f"folded(level={n},inner=companded(curve=log))" for n in (1, 2, 3, 5)),
    "lowrank(rank=1,form=rank_one)",
)  # fmt: skip
_WEIGHT = (
    "split(low_bits=16)", "split", "cast", "cast(to=fp16)",
    *(f"companded(curve={c},group={g})" for c in ("linear", "softsign") for g in (32, 128)),
    *(f"companded(curve=linear,top={t},group=128)" for t in (90, 63, 45, 31, 21, 15, 10, 7)),
    "companded(curve=linear,bits=4,group=32)",
)  # fmt: skip
_RESIDUAL = tuple(
    f"residual(inner=companded(curve={c},top={t},group=128))"
    for c in ("softsign", "linear") for t in (0, 90, 63, 45, 31, 21, 15, 10, 7, 5, 3, 2, 1)
) + tuple(f"residual(inner=companded(curve=linear,top={t},group=1024))" for t in (5, 3, 2, 1))  # fmt: skip


def candidates(role: str, ndim: int, *, based: bool = False) -> list[Codec]:
    """Codecs worth trying for a tensor of this role (raw is always an option); `based`: a base checkpoint holds it
    too.
    """
    texts: Iterable[str] = {"exp_avg": _FIRST, "exp_avg_sq": _SECOND, "weight": _WEIGHT}[role]
    if role == "exp_avg_sq" and 2 <= ndim <= 4:
        from statecodec.choose.snr import subsets

        texts = chain(texts, (f"shared(dims=[{','.join(map(str, dims))}])" for dims in subsets(ndim)))
    if role == "weight" and based:
        texts = chain(texts, _RESIDUAL)
    return [codecs.parse(text) for text in texts]


@dataclass(frozen=True)
class Option:
    """One codec for one tensor: what it would cost, and the squared error it would cause."""

    codec: Codec
    nbytes: float
    error: float


@dataclass(frozen=True)
class CurvePoint:
    """The size of a whole checkpoint at an error of its Adam updates. `label` names a preset; points of the curve have
    none.

    `weights` is how fp32 weights are stored at this point: their error does not enter the update's.
    """

    nbytes: int
    bytes_per_param: float
    update_error: float
    weights: str
    label: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "bytes": self.nbytes, "bytes_per_param": self.bytes_per_param, "update_error": self.update_error,
            "weights": self.weights, "label": self.label,
        }  # fmt: skip


def hull(options: Sequence[Option]) -> list[Option]:
    """The options worth taking, from the least error to the fewest bytes: each saves less per error than the one
    before.
    """
    best: list[Option] = []
    for option in sorted((o for o in options if math.isfinite(o.error)), key=lambda o: (o.error, o.nbytes)):
        if best and option.nbytes >= best[-1].nbytes:
            continue
        while len(best) > 1 and _slope(best[-2], option) <= _slope(best[-2], best[-1]):
            best.pop()
        best.append(option)
    return best


def _slope(a: Option, b: Option) -> float:
    """Error caused per byte saved between two options."""
    return (b.error - a.error) / (a.nbytes - b.nbytes)


@dataclass(frozen=True)
class Allocation:
    """Chosen options by tensor, and their totals."""

    chosen: Mapping[str, Option]

    @property
    def nbytes(self) -> float:
        return sum(o.nbytes for o in self.chosen.values())

    @property
    def error(self) -> float:
        return sum(o.error for o in self.chosen.values())


class Allocator:
    """The curve of all allocations, from the most exact to the smallest."""

    def __init__(self, options: Mapping[str, Sequence[Option]]) -> None:
        """`options`: of each tensor; each needs at least one with a finite error."""
        self.hulls = {name: hull(group) for name, group in options.items()}
        steps = [
            (_slope(a, b), name, i + 1)
            for name, group in self.hulls.items()
            for i, (a, b) in enumerate(pairwise(group))
        ]
        self._steps = sorted(steps, key=lambda step: (step[0], step[2]))

    def within(self, limit: float) -> Allocation:
        """The smallest allocation whose squared error is at most `limit`; the most exact one if none is.

        Steps that no longer fit are skipped, with all that follow of their tensor: what is left of the budget goes to
        smaller ones.
        """
        at = dict.fromkeys(self.hulls, 0)
        spent = sum(group[0].error for group in self.hulls.values())
        for _, name, target in self._steps:
            group = self.hulls[name]
            cost = group[target].error - group[target - 1].error
            if at[name] == target - 1 and spent + cost <= limit:
                at[name], spent = target, spent + cost
        return Allocation({name: group[at[name]] for name, group in self.hulls.items()})

    def curve(self) -> list[tuple[float, float]]:
        """(bytes, squared error) of every allocation on the curve, from the most exact on."""
        nbytes = sum(group[0].nbytes for group in self.hulls.values())
        error = sum(group[0].error for group in self.hulls.values())
        points = [(nbytes, error)]
        for _, name, target in self._steps:
            a, b = self.hulls[name][target - 1 : target + 1]
            nbytes, error = nbytes + b.nbytes - a.nbytes, error + b.error - a.error
            points.append((nbytes, error))
        return points
