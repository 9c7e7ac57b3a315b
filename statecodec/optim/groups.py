"""Parameter groups as training frameworks make them, so that their optimizer states find their parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from statecodec.errors import OptimizerError
from statecodec.names import bare_name

_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decay_groups(model: nn.Module, weight_decay: float, like: str = "transformers") -> list[dict[str, Any]]:
    """Two groups of named parameters, with and without weight decay, in the order in which a framework makes them.

    States without names go by position, so a state saved by the framework loads into an optimizer made on these groups.

    Args:
        model: Its parameters that require gradients are grouped.
        weight_decay: The weight decay of the group that has any.
        like: `transformers` (Trainer since 4.46: not biases, not what is called a norm, not inside nn.LayerNorm),
            `nanogpt` (by dimensions: matrices decay, vectors do not), or `timm` (as nanogpt, but matrices called bias
            do not decay either, and the group without decay comes first).

    Returns:
        Groups for any optimizer's constructor: `params` is a list of (name, parameter).

    Raises:
        OptimizerError: For another `like`.

    Example:
        >>> groups = decay_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 0.1)
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['0.weight'], ['0.bias', '1.weight', '1.bias']]
    """
    if like not in _DECAYS:
        raise OptimizerError(f"like={like!r}, expected one of {', '.join(_DECAYS)}")
    named = [(bare_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = set(_DECAYS[like](model))
    groups = [
        {"params": [(name, p) for name, p in named if name in decayed], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    return groups[::-1] if like == "timm" else groups


def with_names(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An optimizer's state dict with the names of its parameters, so that it loads into groups of any other kind.

    Args:
        state_dict: Of torch.optim or of this library; not changed, its tensors are shared.
        groups: The groups it was saved from, in order, with named parameters, for instance those of `decay_groups`.

    Returns:
        The state dict with `param_names` in its groups.

    Raises:
        OptimizerError: If it was saved from groups of other sizes.
    """
    saved = state_dict["param_groups"]
    sizes, named_sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if sizes != named_sizes:
        raise OptimizerError(
            f"the state was saved from groups of {sizes} parameters, names are given for {named_sizes}"
        )
    named = [
        {**old, "param_names": [name for name, _ in group["params"]]} for old, group in zip(saved, groups, strict=True)
    ]
    return {**state_dict, "param_groups": named}


def _outside_norms(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        inside = isinstance(module, nn.LayerNorm)
        for leaf, _ in module.named_parameters(recurse=False):
            full = bare_name(f"{name}.{leaf}" if name else leaf)
            if not inside and not _UNDECAYED.search(full.lower()):
                yield full


def _matrices(model: nn.Module) -> Iterator[str]:
    return (bare_name(name) for name, p in model.named_parameters() if p.ndim >= 2)


def _matrices_but_bias(model: nn.Module) -> Iterator[str]:
    return (name for name in _matrices(model) if not name.endswith(".bias"))


_DECAYS: dict[str, Callable[[nn.Module], Iterator[str]]] = {
    "transformers": _outside_norms, "nanogpt": _matrices, "timm": _matrices_but_bias,
}  # fmt: skip
