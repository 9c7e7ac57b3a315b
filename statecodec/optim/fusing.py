"""Hands whole param groups to a backend that steps them in few launches; the contract is `kernels.fused`.

Which parameters share a launch, and the addresses of their tensors, are determined once and kept. A step then only
checks that parameters, states and gradients are still the same tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, cast

from torch import Tensor

from statecodec import kernels
from statecodec.errors import OptimizerError
from statecodec.kernels.fused import FusedBackend, Launch, Slot
from statecodec.optim import sharding
from statecodec.optim.method import LOW, Group, Method
from statecodec.optim.states import StateKeeper
from statecodec.optim.watched import Watched

_gradient = attrgetter("grad")


def step_group(optimizer: StateKeeper, group: Group, params: Sequence[Tensor], key: Any) -> list[Tensor]:
    """Step those of `params` that have a gradient and can be fused; returns the others.

    `key` tells this set of parameters from others of the same optimizer. Raises OptimizerError if the optimizer was
    made with fused=True and a parameter cannot be fused.
    """
    gradients: list[Tensor | None] = list(map(_gradient, params))
    demanded = optimizer._fused is True
    wanted = demanded or (optimizer._fused is None and any(p.is_cuda for p in params))
    if not wanted or not any(g is not None for g in gradients):
        return [p for p, g in zip(params, gradients, strict=True) if g is not None]
    launches: GroupLaunches | None = optimizer._launches.get(key)
    if launches is None or not launches.suits(optimizer, group, params, gradients):
        backend = _fused_backend(demanded)
        if backend is None:
            return [p for p, g in zip(params, gradients, strict=True) if g is not None]
        launches = optimizer._launches[key] = GroupLaunches(optimizer, group, params, gradients, backend)
    return launches.step(gradients)


class GroupLaunches:
    """The launches of one param group, as long as its parameters and their states stay where they are."""

    def __init__(
        self,
        optimizer: StateKeeper,
        group: Group,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        backend: FusedBackend,
    ) -> None:
        self._group, self._params = group, list(params)
        self._sharded = any(map(sharding.is_dtensor, params))
        self._rest = list[int]()
        alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        slots: dict[int, Slot] = {}
        for at, (p, grad) in enumerate(zip(params, gradients, strict=True)):
            if grad is None:
                continue
            recipe, state = optimizer.recipe(p, group), optimizer.ensure_state(p, group)
            method, formats = recipe.method, recipe.formats
            shard, sharded = sharding.local(p), sharding.is_dtensor(p)
            low = sharding.local(state[LOW].parts["data"]) if LOW in state else None
            fits = method.hyper(group) is not None and shard.is_contiguous() and not grad.is_sparse
            fits = fits and (optimizer._fused is True or shard.is_cuda)
            # A kernel sees only this rank's elements: neither their position nor what other ranks add to a sum.
            fits = fits and not recipe.across and not (sharded and group["stochastic_rounding"])
            if not (fits and backend.supports(method.name, formats, p.dtype, None if low is None else low.dtype)):
                if optimizer._fused is True:
                    codecs = {k: str(s.codec) for k, s in recipe.specs.items()}
                    raise OptimizerError(
                        f"fused=True, but no fused {method.name} step takes {p.dtype} and {codecs}; use None"
                    )
                self._rest.append(at)
                continue
            states = {k: sharding.own_part(state[k], p).parts for k in recipe.specs}
            slots[at] = Slot(shard.detach(), state["step"], state["skipped"], low, states, recipe.index, recipe.shape)
            low_dtype = None if low is None else low.dtype
            alike[method.kind, tuple(formats.items()), p.dtype, shard.device, low_dtype].append(at)
        # States are made on the first gradient: a parameter that gets one later makes these launches anew.
        self._absent = [at for at, grad in enumerate(gradients) if grad is None]
        self._launches: list[tuple[Method, Launch, list[int]]] = []
        for positions in alike.values():
            recipe = optimizer.recipe(params[positions[0]], group)
            launch = backend.prepare(recipe.method.name, [slots[at] for at in positions], recipe.formats)
            self._launches.append((recipe.method, launch, positions))
        self._addresses = self._where(params)
        self._latest, self._mapping = Watched.latest, optimizer.state
        self._states = [optimizer.state.get(p) for p in params]
        # Views: they show later changes of a state.
        self._views = [state.values() for state in self._states if state is not None]
        self._values = list(chain.from_iterable(self._views))
        self._watched = all(isinstance(d, Watched) for d in (optimizer.state, *filter(None, self._states)))

    def suits(
        self, optimizer: StateKeeper, group: Group, params: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> bool:
        """Whether these launches fit what is given, and the optimizer's states are still the same tensors."""
        return (
            self._group is group
            and len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and self._where(params) == self._addresses
            and all(gradients[at] is None for at in self._absent)
            and self._same_states(optimizer)
        )

    def _same_states(self, optimizer: StateKeeper) -> bool:
        """Whether the optimizer's states are the same tensors, which are looked at only after a change."""
        if self._watched and self._latest is Watched.latest and self._mapping is optimizer.state:
            return True
        latest, values = Watched.latest, list(chain.from_iterable(self._views))
        same = all(map(is_, map(optimizer.state.get, self._params), self._states))
        same = same and len(values) == len(self._values) and all(map(is_, values, self._values))
        if same and self._mapping is optimizer.state:
            self._latest = latest
        return same

    def _where(self, params: Sequence[Tensor]) -> list[int]:
        return list(map(Tensor.data_ptr, map(sharding.local, params) if self._sharded else params))

    def step(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Launch; returns the parameters that were not stepped."""
        local_gradients = gradients
        if self._sharded:
            pairs = zip(self._params, gradients, strict=True)
            local_gradients = [None if g is None else sharding.gradient(p, g) for p, g in pairs]
        for method, launch, positions in self._launches:
            hyper = method.hyper(self._group)
            assert hyper is not None
            every = len(positions) == len(local_gradients)
            launch(local_gradients if every else [local_gradients[at] for at in positions], hyper)
        return [self._params[at] for at in self._rest if gradients[at] is not None]


def _fused_backend(demanded: bool) -> FusedBackend | None:
    """The backend with fused steps; None if there is none and none was demanded."""
    if "triton" not in kernels.available() and not demanded:
        return None
    return cast(FusedBackend, kernels.get("triton"))
