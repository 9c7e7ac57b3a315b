"""Gradient release: step each parameter as soon as its gradient is there, and free the gradient.

The backward pass then never holds more than a few gradients at once. What needs all gradients together cannot be
combined with it: clipping of the global norm, GradScaler, accumulation over several backward passes,
DistributedDataParallel, FSDP1.

Source: FlashOptim (arXiv 2602.23349), section 3.4.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from statecodec.errors import OptimizerError
from statecodec.optim.base import StateOptimizer


class GradientRelease:
    """What `enable_gradient_release` returns: `remove()`, or leaving its `with` block, restores ordinary steps.

    Args:
        hooks: The hooks to remove.
    """

    def __init__(self, hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
        self._hooks = hooks

    @property
    def active(self) -> bool:
        """Whether the hooks are still there."""
        return bool(self._hooks)

    def remove(self) -> None:
        """Detach all hooks; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def enable_gradient_release(model: nn.Module, optimizer: StateOptimizer) -> GradientRelease:
    """Step every parameter of a model during the backward pass, and drop its gradient.

    A tied parameter is stepped once per backward pass, with its whole gradient. `optimizer.step()` stays in the
    training loop (schedulers and hooks expect it): it steps what still has a gradient, normally nothing. Set the
    learning rate before the backward pass.

    Args:
        model: The model. Parameters that the optimizer does not own keep their gradients.
        optimizer: The optimizer to step. The hooks do not keep it alive.

    Returns:
        A handle, also a context manager, that ends gradient release.

    Raises:
        OptimizerError: For DistributedDataParallel and FSDP1 models, and when the optimizer owns no parameter of the
            model.

    Source:
        FlashOptim (arXiv 2602.23349), section 3.4.

    Example:
        >>> from statecodec.optim import SGD
        >>> model = nn.Linear(4, 2)
        >>> optimizer = SGD(model.parameters(), lr=0.1)
        >>> with enable_gradient_release(model, optimizer):
        ...     model(torch.ones(1, 4)).sum().backward()
        >>> model.weight.grad is None
        True
    """
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise OptimizerError(f"gradient release would step before {kind} has reduced the gradients; use step()")
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    released = [p for p in model.parameters() if p in owned and p.requires_grad]
    if not released:
        raise OptimizerError("the optimizer holds none of the model's trainable parameters")
    weak = weakref.ref(optimizer)
    return GradientRelease([p.register_post_accumulate_grad_hook(_hook(weak)) for p in released])  # type: ignore[no-untyped-call]


def _hook(weak: weakref.ref[StateOptimizer]) -> Callable[[Tensor], None]:
    def step_and_free(p: Tensor) -> None:
        optimizer = weak()
        if optimizer is not None and p.grad is not None:
            optimizer.step_param(p)
            p.grad = None

    return step_and_free
