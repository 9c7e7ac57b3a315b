"""Roles: what a tensor of a checkpoint is to training."""

from __future__ import annotations

from typing import Final, Literal, get_args

Role = Literal["weight", "master", "ema", "exp_avg", "exp_avg_sq", "momentum", "max_exp_avg_sq", "step", "other"]
"""`weight` is a parameter; `master` its fp32 copy that mixed-precision training updates; `ema` its running average."""

ROLES: Final[tuple[str, ...]] = get_args(Role)
_FAMILIES: Final = {"master": "weight", "ema": "weight"}


def family(role: str) -> str:
    """The role under whose rules and limits a tensor falls: `weight` for the copies of weights, else the role itself.

    Args:
        role: One of ROLES, or any other text.

    >>> family("master"), family("exp_avg")
    ('weight', 'exp_avg')
    """
    return _FAMILIES.get(role, role)
