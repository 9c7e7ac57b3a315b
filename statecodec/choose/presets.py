"""The presets: named errors in optimizer steps, and two that are rules instead.

Weights may be off by two to four times as much as updates. Their error is made once, but what
exp_avg is off by goes into the next 1 / (1 - beta1) updates and what exp_avg_sq is off by into 1 / (1 - beta2) of them,
so a finer grid for weights costs bytes and changes nothing that can be measured
(docs/decisions/0027-weights-are-off-once.md).

Small tensors stay exact (`is_small`): biases and norms are a thousandth of the bytes and the most sensitive.
docs/codecs.md says what each preset costs and where that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from statecodec import operations
from statecodec.choose.budget import Budget
from statecodec.choose.rules import Rule, parse_rule
from statecodec.errors import PolicyError

MIN_NUMEL = 4096
_MIN_MATRIX = 1024  # elements: smaller ones are no share of any net's bytes
_BIG = f"numel>={MIN_NUMEL}"

_LIVE = (
    f"weight:fp32,{_BIG}=split(high=bf16,low_bits=8)",
    f"exp_avg:{_BIG}=companded(curve=softsign,bits=8,group=64)",
    f"momentum:{_BIG}=companded(curve=softsign,bits=8,group=64)",
    f"exp_avg_sq:{_BIG}=companded(curve=log,bits=8,group=128,per_octave=18)",
    f"max_exp_avg_sq:{_BIG}=companded(curve=log,bits=8,group=128,per_octave=18)",
)
_MOMENTS_GONE = ("exp_avg=dropped", "momentum=dropped", "exp_avg_sq=dropped", "max_exp_avg_sq=dropped")


@dataclass(frozen=True)
class Preset:
    """A named choice of how small, and at what error.

    Args:
        about: One sentence for people.
        budget: The errors of moments and weights, as fractions of one optimizer step; empty if the preset is its rules
            alone.
        rules: Rules that go before the budget.
    """

    about: str
    budget: Budget = field(default_factory=Budget)
    rules: tuple[Rule, ...] = ()


def _rules(texts: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(parse_rule(text) for text in texts)


_BUDGETS = {"resume": Budget(0.01, 0.02), "small": Budget(0.1, 0.3), "tiny": Budget(0.16, 0.64)}
_RULES = {"live": _rules(_LIVE), "weights": _rules(_MOMENTS_GONE)}
PRESETS: dict[str, Preset] = {
    name: Preset(about, _BUDGETS.get(name, Budget()), _RULES.get(name, ()))
    for name, about in operations.PRESETS.items()
}


def is_small(shape: Sequence[int]) -> bool:
    """Whether a tensor stays exact for its size.

    Args:
        shape: Its shape.

    Returns:
        True under 4096 elements; where more than one dimension is longer than 1, under 1024.
    """
    is_matrix = sum(length > 1 for length in shape) > 1
    return math.prod(shape) < (_MIN_MATRIX if is_matrix else MIN_NUMEL)


def preset(name: str) -> Preset:
    """Look up a preset.

    Args:
        name: Its name.

    Returns:
        The preset.

    Raises:
        PolicyError: If there is none of that name.
    """
    if name not in PRESETS:
        raise PolicyError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
