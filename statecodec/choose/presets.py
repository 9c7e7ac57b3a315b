"""The presets: named points between exact and small. docs/codecs.md says what each costs and where that was measured.

Small tensors (biases, norms, anything under 4096 elements) stay exact: they are a thousandth of the bytes and the most
sensitive.
"""

from __future__ import annotations

from functools import cache

from statecodec.choose.rules import Rule, parse_rule
from statecodec.errors import PolicyError

_BIG = "numel>=4096"

_MOMENTS_8 = (
    f"exp_avg:{_BIG}=companded(curve=softsign,bits=8,group=64)",
    f"momentum:{_BIG}=companded(curve=softsign,bits=8,group=64)",
    f"exp_avg_sq:{_BIG}=companded(curve=log,bits=8,group=128,steps=18)",
    f"max_exp_avg_sq:{_BIG}=companded(curve=log,bits=8,group=128,steps=18)",
)
_MOMENTS_4 = (
    f"exp_avg:{_BIG}=companded(curve=softsign,bits=4,group=32)",
    f"momentum:{_BIG}=companded(curve=softsign,bits=4,group=32)",
    f"exp_avg_sq:{_BIG}=companded(curve=log,bits=4,group=128)",
    f"max_exp_avg_sq:{_BIG}=companded(curve=log,bits=4,group=128)",
)
_MOMENTS_GONE = ("exp_avg=dropped", "momentum=dropped", "exp_avg_sq=dropped", "max_exp_avg_sq=dropped")
_SPLIT = (f"weight:fp32,{_BIG}=split(high=bf16,low_bits=8)",)
_BF16 = (f"weight:fp32,{_BIG}=cast(to=bf16)",)

PRESETS: dict[str, tuple[str, ...]] = {
    "lossless": (),
    "resume": (*_SPLIT, *_MOMENTS_8),
    "small": (*_SPLIT, *_MOMENTS_4),
    "tiny": (*_BF16, *_MOMENTS_4),
    "weights": _MOMENTS_GONE,
}


@cache
def preset_rules(name: str) -> tuple[Rule, ...]:
    """The rules of a preset. Raises PolicyError for an unknown name."""
    if name not in PRESETS:
        raise PolicyError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return tuple(parse_rule(text) for text in PRESETS[name])
