"""Full-precision weights of a model whose optimizer keeps their low parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from statecodec.errors import OptimizerError
from statecodec.optim import sharding
from statecodec.optim.base import StateOptimizer


def fp32_state_dict(model: nn.Module, optimizer: StateOptimizer) -> dict[str, Tensor]:
    """The model's state dict with master weights in place of the parameters that the optimizer owns.

    Args:
        model: The model.
        optimizer: The optimizer of its parameters.

    Returns:
        The names of `model.state_dict()`; owned parameters in fp32 (fp64 for fp64 parameters), everything else as it
        is.

    Example:
        >>> from statecodec.optim import AdamW
        >>> model = nn.Linear(4, 2).bfloat16()
        >>> {name: value.dtype for name, value in fp32_state_dict(model, AdamW(model.parameters())).items()}
        {'weight': torch.float32, 'bias': torch.float32}
    """
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    masters: dict[Tensor, Tensor] = {}
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p in owned:
            state[name] = masters.setdefault(p, optimizer.master_weight(p))
    return state


def load_fp32_state_dict(model: nn.Module, optimizer: StateOptimizer, state: Mapping[str, Tensor]) -> None:
    """Load full-precision weights into a model and into the master weights of its optimizer.

    Unlike a cast to bf16 it loses no bit that the split can hold.

    Args:
        model: The model.
        optimizer: The optimizer of its parameters.
        state: Weights of any float dtype under the names of `model.state_dict()`, whole or DTensors.

    Raises:
        OptimizerError: For missing or unexpected names and for other shapes; nothing is changed then.
    """
    expected = model.state_dict()
    if state.keys() != expected.keys():
        difference = sorted(state.keys() ^ expected.keys())
        raise OptimizerError(f"weights and model differ in {len(difference)} names, among them {difference[:4]}")
    shapes = [name for name, value in expected.items() if value.shape != state[name].shape]
    if shapes:
        raise OptimizerError(f"the weights have other shapes than the model at {shapes[:4]}")
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    masters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p in owned}
    with torch.no_grad():
        for name, value in expected.items():
            if name in masters:
                optimizer.set_master_weight(masters[name], state[name])
            else:
                sharding.local(value).copy_(sharding.sliced(state[name], value))
