"""Methods that need all of a matrix: matrices of one shape are stepped side by side, as one batch of products.

Nothing here waits for the device: how often a matrix was stepped, and whether it keeps its old bytes, is known there
only. A matrix keeps them, and is counted in `skipped`, if its gradient is not finite or too large, or if its new weight
would be.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from statecodec import dtypes, kernels
from statecodec.codecs import Cast, Codec, Raw
from statecodec.kernels.fused import LARGEST, LARGEST_FP16
from statecodec.kernels.reference.steps import GOLDEN, dither_rows, mix, mix_tensor
from statecodec.optim import sharding
from statecodec.optim.method import (
    LOW,
    Group,
    Method,
    Recipe,
    StateSpec,
    decay_per_lr,
    dense_gradient,
    made_for,
    matrix_shape,
)
from statecodec.optim.states import StateKeeper

LARGEST_GRADIENT = 2.0**48  # squares, summed over a matrix, stay within fp32
ELEMENTS = 1 << 22  # of a batch: 16 MiB for each of its temporaries, and 256 tiles of 128 x 128 to fill a GPU
_CASTS = {torch.bfloat16: Cast("bf16"), torch.float16: Cast("fp16")}


class WholeMatrix(Method):
    """A method that needs all of a matrix at once."""

    whole = True

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Move `batch.weight`, in place, and the states (`Stacked.replace`)."""


class Stacked:
    """One stored tensor of every matrix in a batch: parts side by side, which are those of one tall tensor.

    Args:
        codec: how it is stored.
        shape: of one of them; at least two dimensions.
        dtype: of its values.
        members: the parts of each, which `store` writes to.
    """

    def __init__(
        self, codec: Codec, shape: tuple[int, ...], dtype: torch.dtype, members: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self._codec, self._dtype, self._members = codec, dtype, members
        self._tall = (len(members) * shape[0], *shape[1:])
        self.parts = {k: torch.stack([parts[k] for parts in members]) for k in members[0]}
        self._new: dict[str, Tensor] = {}

    def decode(self, backend: kernels.Backend) -> Tensor:
        """The values, as (count, rows, cols)."""
        device = next(iter(self.parts.values())).device
        values = torch.empty(self._tall, dtype=self._dtype, device=device)
        shapes = self._codec.parts(self._tall, dtypes.of(self._dtype))
        self._codec.decode_into({k: x.view(shapes[k].shape) for k, x in self.parts.items()}, values, backend)
        return values.view(len(self._members), self._tall[0] // len(self._members), -1)

    def encode(self, values: Tensor, backend: kernels.Backend) -> None:
        """What `store` will write, from finite values as (count, rows, cols)."""
        shapes = self._codec.parts(self._tall, dtypes.of(self._dtype))
        new = {k: torch.empty(s.shape, dtype=s.dtype.torch, device=values.device) for k, s in shapes.items()}
        with kernels.trusting():
            self._codec.encode_into(values.view(self._tall), new, backend)
        self.replace(new)

    def replace(self, new: Mapping[str, Tensor]) -> None:
        """What `store` will write, as parts of all matrices."""
        self._new = {k: x.view(self.parts[k].shape) for k, x in new.items()}

    def store(self, fits: Tensor) -> None:
        """Write what is new to those that fit (count); the others get their old bytes."""
        for k, new in self._new.items():
            old = self.parts[k]
            kept = torch.where(fits.view(-1, *(1,) * (old.ndim - 1)), new, old)
            torch._foreach_copy_([parts[k] for parts in self._members], list(kept.unbind(0)))


@dataclass
class Batch:
    """Matrices of one shape and kind in one step.

    `weight` and `gradient` are (count, rows, cols), fp32 or fp64, and may be overwritten; a gradient that is not finite
    or too large is 0. `steps` (count) are the counters, this step included.
    """

    recipes: Sequence[Recipe]
    group: Group
    weight: Tensor
    gradient: Tensor
    steps: Tensor
    states: Mapping[str, Stacked]
    backend: kernels.Backend
    fits: Tensor = field(init=False)  # (count): which matrices are to be stored

    def __post_init__(self) -> None:
        self.fits = torch.ones(len(self.recipes), dtype=torch.bool, device=self.weight.device)
        self.require(self.gradient, LARGEST_GRADIENT)
        self.gradient.masked_fill_(~self.fits.view(-1, 1, 1), 0)

    @property
    def lr(self) -> float | Tensor:
        return cast("float | Tensor", self.group["lr"])

    @property
    def decay(self) -> float | Tensor:
        """The factor of decoupled weight decay."""
        return 1 - self.lr * decay_per_lr(self.group)

    @property
    def t(self) -> Tensor:
        """The steps, as fp64 (count, 1, 1)."""
        return self.steps.to(torch.float64).view(-1, 1, 1)

    def require(self, x: Tensor, limit: float) -> None:
        """Only matrices of which every |x| is below `limit` are stored; NaN is not."""
        low, high = torch.aminmax(x.view(len(x), -1), dim=1)
        self.fits = self.fits & (low > -limit) & (high < limit)

    def round_weight(self, drop: int) -> None:
        """Stochastic rounding of the weight's low `drop` bits: the numbers of `reference.steps.dither`."""
        seeds = [mix(self.group["seed"] + r.index * GOLDEN) for r in self.recipes]
        device = self.weight.device
        starts = torch.stack([torch.full((), s, dtype=torch.int64, device=device) for s in seeds])
        keys = mix_tensor((starts + self.steps.to(torch.int64)) & 0xFFFFFFFF)
        dither_rows(self.weight.view(len(seeds), -1), drop=drop, keys=keys)


def step_matrices(optimizer: StateKeeper, group: Group, params: Sequence[Tensor]) -> list[Tensor]:
    """Step those of `params` that have a WholeMatrix method; returns the others. All have gradients."""
    rest, alike = list[Tensor](), defaultdict[Any, list[Tensor]](list)
    for p in params:
        method = optimizer.recipe(p, group).method
        if isinstance(method, WholeMatrix):
            alike[method.kind, made_for(p)].append(p)
        else:
            rest.append(p)
    for same in alike.values():
        count = max(1, ELEMENTS // max(1, same[0].numel()))
        for at in range(0, len(same), count):
            _step_batch(optimizer, group, same[at : at + count])
    return rest


def _step_batch(optimizer: StateKeeper, group: Group, params: Sequence[Tensor]) -> None:
    """Step parameters of one method, shape, dtype and place."""
    gradients = [sharding.gradient(p, dense_gradient(p)) for p in params]
    recipes = [optimizer.recipe(p, group) for p in params]
    states = [optimizer.ensure_state(p, group) for p in params]
    counters = [state["step"] for state in states]
    torch._foreach_add_(counters, 1)
    recipe, backend = recipes[0], kernels.resolve(optimizer._backend, states[0]["step"].device)
    own = [sharding.local(p).detach() for p in params]
    stored = _weights(recipe, own, states)
    weight = stored.decode(backend)
    gradient = torch.stack(gradients).to(weight.dtype).view(weight.shape)
    batch = Batch(
        recipes, group, weight, gradient.neg_() if group["maximize"] else gradient, torch.stack(counters),
        {k: _stacked(s, k, params, states) for k, s in recipe.own_specs.items()}, backend,
    )  # fmt: skip
    cast(WholeMatrix, recipe.method).update(batch)
    batch.require(weight, LARGEST_FP16 if params[0].dtype == torch.float16 else LARGEST)
    weight.masked_fill_(~batch.fits.view(-1, 1, 1), 0)
    dropped = 0 if weight.dtype == params[0].dtype else 16 - (recipe.split.low_bits if recipe.split else 0)
    if group["stochastic_rounding"] and dropped:
        batch.round_weight(dropped)
    stored.encode(weight, backend)
    for one in (stored, *batch.states.values()):
        one.store(batch.fits)
    torch._foreach_add_([state["skipped"] for state in states], list((~batch.fits).to(torch.float32).unbind(0)))


def _stacked(spec: StateSpec, name: str, params: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> Stacked:
    parts = [sharding.own_part(state[name], p).parts for p, state in zip(params, states, strict=True)]
    return Stacked(spec.codec, spec.shape, spec.dtype, parts)


def _weights(recipe: Recipe, own: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> Stacked:
    """The weights as they are stored: parameter and low part, or the parameter alone."""
    first, shape = own[0], matrix_shape(tuple(own[0].shape))
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    if recipe.split is None:
        return Stacked(_CASTS.get(first.dtype, Raw()), shape, dtype, [{"data": p} for p in own])
    lows = [sharding.local(state[LOW].parts["data"]) for state in states]
    parts = [{"high": p, "low": low} for p, low in zip(own, lows, strict=True)]
    return Stacked(recipe.split, shape, dtype, parts)
