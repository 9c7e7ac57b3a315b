"""The tensors that the promise of a budget does not bound, counted by reason, and the notes about them.

Not every tensor has a step to count in, and 24 bits are the finest that weights are stored with. A file may have 10^5
such tensors: a note for each reason says how many they are and names the first two. Shares of a compression count their
own; the counts add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from statecodec.choose.budget import Budget, codes_per_octave
from statecodec.figures import percent

_NAMED = 2  # tensors that a note names


class Why(Enum):
    """Why a tensor is not bounded by what was asked for."""

    NO_RATE = "no rate"
    RATE_IS_ZERO = "rate is 0"
    NO_MOMENTS = "no moments"
    UNMATCHED = "unmatched"
    NO_UPDATE = "no update"
    SECOND_ALONE = "second alone"
    UNDERFLOWED = "underflowed"
    COARSE = "coarse"


_NO_STEP = {
    Why.NO_RATE: "the file has no learning rate; keep lr in the optimizer's param groups",
    Why.RATE_IS_ZERO: "the learning rate is 0; keep initial_lr in the param groups, as torch's schedulers do",
    Why.NO_MOMENTS: "the file has no moments of an optimizer; compress them with its states, if it keeps any",
    Why.UNMATCHED: "it is not certain whose the optimizer's states are; give the optimizer named_parameters()",
    Why.NO_UPDATE: "the optimizer's states do not tell its updates, as those of RMSprop, Adagrad and Adafactor do not",
}


@dataclass(frozen=True)
class Shortfall:
    """Why one tensor is not bounded; `off`: its error in steps, where one is known."""

    why: Why
    off: float = 0.0


@dataclass(frozen=True)
class Tally:
    """The tensors of one reason: how many, the first of them, and the largest error in steps."""

    count: int
    first: tuple[str, ...]
    off: float

    @classmethod
    def of(cls, found: Sequence[tuple[str, Shortfall]]) -> Tally:
        """Of the tensors of one reason, by name, in order."""
        return cls(len(found), tuple(name for name, _ in found[:_NAMED]), max(short.off for _, short in found))

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return f"{', '.join(self.first)} and {more:,} more" if more else " and ".join(self.first)


@dataclass(frozen=True)
class Kept:
    """What the promise of a budget came to. `bounded`: names of errors (`Budget.figures`) that some tensor has."""

    bounded: frozenset[str] = frozenset()
    tallies: Mapping[Why, Tally] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, Any]], index: Mapping[str, int]) -> Kept:
        """Of the `to_json` of all shares; `index`: of every tensor, by name.

        Raises KeyError, TypeError, ValueError or AttributeError for anything else.
        """
        tallies = {}
        for why in Why:
            these = [part["tallies"][why.value] for part in parts if why.value in part["tallies"]]
            if these:
                counts, names, offs = zip(*these, strict=True)
                first = sorted((name for of_share in names for name in of_share), key=index.__getitem__)[:_NAMED]
                tallies[why] = Tally(sum(map(int, counts)), tuple(first), max(map(float, offs)))
        return cls(frozenset(str(name) for part in parts for name in part["bounded"]), tallies)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, of which `joined` makes it again."""
        tallies = {why.value: [tally.count, list(tally.first), tally.off] for why, tally in self.tallies.items()}
        return {"bounded": sorted(self.bounded), "tallies": tallies}

    def figures(self, budget: Budget) -> dict[str, float]:
        """The halves of a budget that bound a tensor."""
        return {name: fraction for name, fraction in budget.figures.items() if name in self.bounded}

    def notes(self, budget: Budget) -> Iterator[str]:
        """What the budget does not bound, a note for each reason."""
        for why in Why:
            if why in self.tallies:
                yield _note(why, self.tallies[why], budget)


def _note(why: Why, tally: Tally, budget: Budget) -> str:
    plural = "s" if tally.count > 1 else ""
    weights = f"{tally.count:,} weight{plural} ({tally})"
    if why is Why.COARSE:
        return (
            f"{weights}: off by more than {percent(budget.weights)} of a step, the furthest by {percent(tally.off)}, "
            "because steps are small beside the values and 24 bits are the finest that is stored; --preset lossless "
            "keeps all exact, a rule NAME=raw one"
        )
    if why is Why.UNDERFLOWED:
        return (
            f"{tally.count:,} moments ({tally}): kept exact, because exp_avg_sq is 0 where exp_avg is not; such "
            "parameters make steps of exp_avg / eps"
        )
    if why is Why.SECOND_ALONE:
        codes = codes_per_octave(budget.moments or 1.0)
        return (
            f"{tally.count:,} second moment{plural} ({tally}): not counted in steps, because they are beside no "
            f"exp_avg; stored with {codes} codes an octave instead, each number within "
            f"{100 * (2 ** (0.5 / codes) - 1):.2g} %; a rule exp_avg_sq=raw keeps them exact"
        )
    return (
        f"{weights}: stored with 24 bits, within 2^-16 of their rms, not within {percent(budget.weights)} of a step, "
        f"because {_NO_STEP[why]}; a rule NAME=raw or --preset lossless keeps them exact"
    )
