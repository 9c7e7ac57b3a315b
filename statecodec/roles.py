"""What a tensor is to training: its role, and the keys under which optimizers keep tensors of each role."""

from __future__ import annotations

from typing import Final, Literal, get_args

Role = Literal["weight", "master", "ema", "exp_avg", "exp_avg_sq", "momentum", "max_exp_avg_sq", "step", "other"]
"""`weight` is a parameter; `master` its fp32 copy that mixed-precision training updates; `ema` its running average."""

ROLES: Final[tuple[str, ...]] = get_args(Role)
_FAMILIES: Final = {"master": "weight", "ema": "weight"}

MOMENT_ROLES: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum")
"""What an optimizer averages over steps."""

SKELETON_ROLES: Final = ("skeleton", "file")
"""Of items that are no tensors: what is left of a file without its tensors, and a file without any."""

STATE_ROLES: Final[dict[str, Role]] = {
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "square_avg": "exp_avg_sq",  # RMSprop's name for the same average
    "max_exp_avg_sq": "max_exp_avg_sq",
    "max_exp_avg_sqs": "max_exp_avg_sq",
    "momentum_buffer": "momentum",
    "ax": "ema",  # of ASGD: the average, equal to the weight as long as averaging has not begun
    "master_param": "master",
    "fp32_param": "master",  # Megatron's distributed optimizer
}
"""Key in an optimizer's state -> role."""


def family(role: str) -> str:
    """The role under whose rules and limits a tensor falls: `weight` for the copies of weights, else the role itself.

    Args:
        role: One of ROLES, or any other text.

    >>> family("master"), family("exp_avg")
    ('weight', 'exp_avg')
    """
    return _FAMILIES.get(role, role)
