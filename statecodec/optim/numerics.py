"""Whether steps are large enough to change the stored weights: a change of less than half their spacing rounds away."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from statecodec.optim import sharding
from statecodec.optim.base import StateOptimizer
from statecodec.optim.method import Group, decay_per_lr

# Relative spacing just below a power of two, where it is smallest: 2**-(mantissa bits + 1) of the value.
_MANTISSA = {torch.float64: 52, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


@dataclass(frozen=True)
class InvisibleStep:
    """One parameter whose step or decay is smaller than half the spacing of its stored weights.

    Args:
        param: Its name, or its position.
        kind: `step` or `decay`.
        change: The relative change that is asked for.
        needed: The smallest relative change that is sure to be stored.
    """

    param: str | int
    kind: str
    change: float
    needed: float

    def __str__(self) -> str:
        return (
            f"{self.param}: a {self.kind} of {self.change:.2e} relative rounds away (needed: {self.needed:.2e}); "
            "use stochastic_rounding=True, master_weights='split32', or a larger lr"
        )


@torch.no_grad()
def invisible_steps(optimizer: StateOptimizer, typical_update: float = 0.1) -> list[InvisibleStep]:
    """The steps and decays that the stored weights would round away at the present learning rate.

    A step of lr * `typical_update` is compared with the spacing of the stored weights at the parameter's largest
    weight, and decay (lr * weight_decay, a relative change) with their relative spacing. Parameters that round
    stochastically lose nothing on average and are left out. Reads every parameter once: call it at the start, and when
    the schedule has made the learning rate small.

    Args:
        optimizer: Any optimizer of this package.
        typical_update: Size of an update before lr: 0.1 to 1 for Adam, 1 for Lion.

    Returns:
        One entry for each parameter and kind of change; empty if nothing is lost.

    Source:
        FlashOptim's `check_numerics`, with decay in addition.

    Example:
        >>> from statecodec.optim import AdamW
        >>> model = torch.nn.Linear(4, 2).bfloat16()
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-5, weight_decay=0.1, master_weights=None)
        >>> sorted({entry.kind for entry in invisible_steps(optimizer)})
        ['decay', 'step']
    """
    invisible = []
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        for p in group["params"]:
            recipe = optimizer.recipe(p, group)
            bits = _mantissa_bits(p, group)
            shard = sharding.local(p)
            if lr == 0 or bits is None or not shard.numel():
                continue
            name = recipe.label
            decay = lr * decay_per_lr(group)
            # Half the spacing over the largest value below a power of two: no smaller relative change is ever stored.
            if 0 < decay <= 2.0 ** -(bits + 2):
                invisible.append(InvisibleStep(name, "decay", decay, 2.0 ** -(bits + 1)))
            largest = float(shard.abs().amax())
            if not (0 < largest < math.inf):
                continue
            spacing = 2.0 ** (math.floor(math.log2(largest)) - bits)
            if lr * typical_update < spacing / 2:
                invisible.append(InvisibleStep(name, "step", lr * typical_update / largest, spacing / 2 / largest))
    return invisible


def _mantissa_bits(p: Tensor, group: Group) -> int | None:
    """Mantissa bits of the stored weight; None if it rounds stochastically."""
    bits = _MANTISSA[p.dtype]
    if p.dtype not in (torch.bfloat16, torch.float16):
        return bits
    if group["stochastic_rounding"] and group["master_weights"] != "split32":
        return None
    extra = {None: 0, "split24": 8, "split32": 16}[group["master_weights"]]
    return min(bits + extra, 23)
