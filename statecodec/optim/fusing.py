"""Handing whole groups to a backend that steps them in one launch; the contract is `kernels.fused`."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from statecodec import kernels
from statecodec.errors import OptimizerError
from statecodec.kernels.fused import FusedStep, Slot
from statecodec.optim.method import Group

if TYPE_CHECKING:
    from statecodec.optim.states import StateKeeper


def step_group(optimizer: StateKeeper, group: Group, ready: list[Tensor]) -> list[Tensor]:
    """Step what can be fused, one launch per kind of slot; returns the parameters that are left for the generic path.

    Raises OptimizerError if the optimizer was made with fused=True and a parameter cannot be fused.
    """
    demanded = optimizer._fused is True
    if not ready or not (demanded or any(p.device.type == "cuda" for p in ready)):
        return ready
    backend = _fused_backend(demanded)
    if backend is None:
        return ready
    launches: dict[tuple[Any, ...], list[Slot]] = defaultdict(list)
    kinds: dict[str, tuple[str, dict[str, Any]]] = {}
    rest = []
    for p in ready:
        recipe = optimizer.recipe(p, group)
        hyper = recipe.method.hyper(group)
        formats, grad = recipe.formats, cast(Tensor, p.grad).detach()
        state, name = optimizer.ensure_state(p, group), recipe.method.name
        low = state["weight_low"].parts["data"] if "weight_low" in state else None
        fits = hyper is not None and p.is_contiguous() and not grad.is_sparse and (demanded or p.is_cuda)
        if not (fits and backend.supports(name, formats, p.dtype, None if low is None else low.dtype)):
            if demanded:
                raise OptimizerError(f"fused=True, but no fused {name} step takes {p.dtype} and {formats}; use None")
            rest.append(p)
            continue
        key = (recipe.kind, hyper, p.dtype, p.device, None if low is None else low.dtype)
        states = {k: state[k].parts for k in recipe.specs}
        kinds[recipe.kind] = name, formats
        launches[key].append(
            Slot(p.detach(), grad, state["step"], state["skipped"], low, states, recipe.index, recipe.shape)
        )
    for (kind, hyper, *_), slots in launches.items():
        backend.step(kinds[kind][0], slots, kinds[kind][1], hyper)
    return rest


def _fused_backend(demanded: bool) -> FusedStep | None:
    """The backend with fused steps; None if there is none and none was demanded."""
    if "triton" not in kernels.available() and not demanded:
        return None
    backend = cast(Any, kernels.get("triton"))
    if hasattr(backend, "supports") and hasattr(backend, "step"):
        return cast(FusedStep, backend)
    if demanded:
        raise OptimizerError("fused=True, but this build of the triton backend has no fused steps")
    return None
