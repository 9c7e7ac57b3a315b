"""The presets: named fractions of one optimizer step, and two that are rules instead.

Small tensors (biases, norms, anything under 4096 elements) stay exact: they are a thousandth of the bytes and the most
sensitive. docs/codecs.md says what each preset costs and where that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from statecodec import operations
from statecodec.choose.rules import Rule, parse_rule
from statecodec.errors import PolicyError

MIN_NUMEL = 4096
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
        step_error: The error of weights and moments, as a fraction of one optimizer step; None if the preset is its
            rules alone.
        rules: Rules that go before the step error.
    """

    about: str
    step_error: float | None = None
    rules: tuple[Rule, ...] = ()


def _rules(texts: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(parse_rule(text) for text in texts)


_STEP_ERRORS = {"resume": 0.01, "small": 0.1, "tiny": 0.3}
_RULES = {"live": _rules(_LIVE), "weights": _rules(_MOMENTS_GONE)}
PRESETS: dict[str, Preset] = {
    name: Preset(about, _STEP_ERRORS.get(name), _RULES.get(name, ())) for name, about in operations.PRESETS.items()
}


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
