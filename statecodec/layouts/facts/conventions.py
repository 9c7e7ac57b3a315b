"""The usual division of parameters into a group with weight decay and one without, for cases that shapes leave open.

Weights and biases of batch normalisation have one shape, and transformers' Trainer decays the weights only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from statecodec.layouts.facts.match import Shape

# What Trainer looks for in lower-case names, and the names under which known models keep torch's LayerNorm.
_UNDECAYED: Final = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)|(^|\.)(ln_\w+|norm\d+)($|\.)")


def usual_division(
    names: Sequence[str], shapes: Sequence[Shape], groups: Sequence[Sequence[Shape | None]], decays: Sequence[Any]
) -> list[list[int]] | None:
    """For each group its weights' indices, if the groups are Trainer's: one with weight decay, then one without.

    Args:
        names: The weights, in the model's order.
        shapes: Their shapes.
        groups: The shapes of each group's parameters; None where it is not known.
        decays: Each group's `weight_decay`.
    """
    if len(groups) != 2 or decays[1] != 0:
        return None
    decayed = [_UNDECAYED.search(name.lower()) is None for name in names]
    division = [[i for i, d in enumerate(decayed) if d is wanted] for wanted in (True, False)]
    fits = all(
        len(group) == len(weights) and all(g in (None, shapes[w]) for g, w in zip(group, weights, strict=True))
        for group, weights in zip(groups, division, strict=True)
    )
    return division if fits else None
