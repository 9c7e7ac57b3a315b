"""The dense form of a state: full-size moments, as torch.optim.AdamW or SGD keep them.

Folded moments are repeated, shared ones broadcast, low-rank ones multiplied out. One optimizer's state is converted to
another's through this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from statecodec.codecs import Codec, EncodedTensor, LowRank
from statecodec.optim import sharding
from statecodec.optim.method import Group

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def decode_moments(
    moments: Mapping[str, EncodedTensor], p: Tensor, step: int, group: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Dense moments of what this rank holds of a parameter.

    `group` are the options that the moments were made with.
    """
    dense = {}
    for name, encoded in moments.items():
        x = sharding.decode(encoded, p)
        dense[name] = x.mul_(low_rank_gain(encoded.codec, step, group)) if name == "exp_avg_sq" else x
    return dense


def low_rank_gain(codec: Codec, step: int, group: Mapping[str, Any]) -> float:
    """The factor from a low-rank second moment to Adam's; 1 for every other codec.

    A low-rank second moment is (EMA of |g| with sqrt(beta2))**2: its start-up bias is not the one Adam divides out.
    """
    if not (isinstance(codec, LowRank) and codec.form == "square") or step < 1:
        return 1.0
    beta2 = float(group.get("betas", (0.9, 0.999))[1])
    return float((1 - beta2**step) / (1 - beta2 ** (step / 2)) ** 2)


def every_moment(
    dense: dict[str, Tensor], saved: Mapping[str, Any], group: Group
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Dense moments, with the average and the momentum buffer derived from each other, and where each is from.

    `saved` are the options that the moments were made with, `group` those that they will be used with.
    """
    kinds = dict.fromkeys(dense, "encoded")
    theirs, ours = _buffer_gain(saved), _buffer_gain(group)
    if "momentum_buffer" in dense:
        buffer = dense["momentum_buffer"]
        if "exp_avg" not in dense:
            dense["exp_avg"], kinds["exp_avg"] = buffer / theirs, "converted"
        if theirs != ours:
            dense["momentum_buffer"], kinds["momentum_buffer"] = buffer * (ours / theirs), "converted"
    elif "exp_avg" in dense:
        dense["momentum_buffer"], kinds["momentum_buffer"] = dense["exp_avg"] * ours, "converted"
    return dense, kinds


def update_direction(m: Tensor, v: Tensor) -> Tensor:
    """m / sqrt(v) in fp64."""
    return m.to(torch.float64) / (v.to(torch.float64).sqrt() + 1e-30)


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """||approximate - exact|| / ||exact||, in fp64; 0 for empty tensors."""
    exact = exact.to(device=approximate.device, dtype=torch.float64)
    difference = torch.linalg.vector_norm(approximate.to(torch.float64) - exact)
    return float(difference / torch.linalg.vector_norm(exact).clamp(min=1e-300)) if exact.numel() else 0.0


def _buffer_gain(group: Mapping[str, Any]) -> float:
    """The factor from the exponential average to a momentum buffer: SGD sums, Muon (torch's and ours) averages."""
    if group.get("algorithm") == "muon" or ("ns_steps" in group and group.get("algorithm") != "lorapre"):
        return 1.0
    momentum = float(group.get("momentum", group.get("betas", (0.9,))[0]))
    return (1 - float(group.get("dampening", 0.0))) / max(1 - momentum, 1e-8)
