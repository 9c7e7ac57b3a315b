"""Methods that need a whole matrix: matrices of one shape are stepped together, as one batch of products.

Nothing here waits for the device: how often a matrix was stepped, and whether it keeps its old bytes, is known there
only. A matrix keeps them, and is counted in `skipped`, if its gradient is not finite or too large, or if its new weight
would be.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    decay_per_lr,
    dense_gradient,
    matrix_shape,
)
from statecodec.optim.states import StateKeeper

LARGEST_GRADIENT = 2.0**48  # squares, summed over a matrix, stay within fp32
ELEMENTS = 1 << 22  # of a batch: 16 MiB for each of its temporaries, and 256 tiles of 128 x 128 to fill a GPU
_WEIGHT = "weight"
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
        self._pending: dict[str, Tensor] = {}

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
        parts = {k: torch.empty(s.shape, dtype=s.dtype.torch, device=values.device) for k, s in shapes.items()}
        with kernels.trusting():
            self._codec.encode_into(values.view(self._tall), parts, backend)
        self.replace(parts)

    def replace(self, parts: Mapping[str, Tensor]) -> None:
        """What `store` will write, as parts of all matrices."""
        self._pending = {k: x.view(self.parts[k].shape) for k, x in parts.items()}

    def store(self, fits: Tensor) -> None:
        """Write the new parts of the matrices in `fits` (count); the others keep their old bytes."""
        for k, part in self._pending.items():
            old = self.parts[k]
            kept = torch.where(fits.view(-1, *(1,) * (old.ndim - 1)), part, old)
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


@dataclass(frozen=True)
class StoredMatrix:
    """What a step of one whole matrix reads and writes: its tensors as they are stored.

    `stored` has the parts of every state by (state, part), and the weight's as ("weight", "high") and ("weight", "low")
    or ("weight", "data"). They are written in place, as the counters are.
    """

    recipe: Recipe
    gradient: Tensor
    step: Tensor
    skipped: Tensor
    stored: Mapping[tuple[str, str], Tensor]

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of the weight, or of a state."""
        return {part: t for (of, part), t in self.stored.items() if of == name}

    def local(self) -> StoredMatrix:
        """What this rank holds of it."""
        return replace(self, stored={k: sharding.local(t).detach() for k, t in self.stored.items()})


def batches(same: Sequence[Tensor], times: int = 1) -> list[Sequence[Tensor]]:
    """Parameters of one shape in batches of about `ELEMENTS` * `times` elements."""
    count = max(1, ELEMENTS // max(1, same[0].numel())) * times
    return [same[at : at + count] for at in range(0, len(same), count)]


def members(optimizer: StateKeeper, group: Group, params: Sequence[Tensor]) -> list[StoredMatrix]:
    """What steps of these parameters read and write, as stored, DTensors included. Counts the step."""
    states = [optimizer.ensure_state(p, group) for p in params]
    torch._foreach_add_([state["step"] for state in states], 1)
    return [_member(optimizer.recipe(p, group), p, state) for p, state in zip(params, states, strict=True)]


def _member(recipe: Recipe, p: Tensor, state: Mapping[str, Any]) -> StoredMatrix:
    stored = {(k, part): t for k in recipe.specs for part, t in state[k].parts.items()}
    if recipe.split is None:
        stored[_WEIGHT, "data"] = p
    else:
        stored |= {(_WEIGHT, "high"): p, (_WEIGHT, "low"): state[LOW].parts["data"]}
    return StoredMatrix(recipe, sharding.gradient(p, dense_gradient(p)), state["step"], state["skipped"], stored)


def step_batch(optimizer: StateKeeper, group: Group, members: Sequence[StoredMatrix]) -> None:
    """Step whole matrices of one method, shape and dtype."""
    recipe, backend = members[0].recipe, kernels.resolve(optimizer._backend, members[0].step.device)
    param = recipe.made_for[0]
    stored = _weights(recipe, members)
    weight = stored.decode(backend)
    gradient = torch.stack([m.gradient for m in members]).to(weight.dtype).view(weight.shape)
    batch = Batch(
        [m.recipe for m in members],
        group,
        weight,
        gradient.neg_() if group["maximize"] else gradient,
        torch.stack([m.step for m in members]),
        {k: Stacked(s.codec, s.shape, s.dtype, [m.parts(k) for m in members]) for k, s in recipe.specs.items()},
        backend,
    )
    cast(WholeMatrix, recipe.method).update(batch)
    batch.require(weight, LARGEST_FP16 if param == torch.float16 else LARGEST)
    weight.masked_fill_(~batch.fits.view(-1, 1, 1), 0)
    dropped = 0 if weight.dtype == param else 16 - (recipe.split.low_bits if recipe.split else 0)
    if group["stochastic_rounding"] and dropped:
        batch.round_weight(dropped)
    stored.encode(weight, backend)
    for stacked in (stored, *batch.states.values()):
        stacked.store(batch.fits)
    torch._foreach_add_([m.skipped for m in members], list((~batch.fits).to(torch.float32).unbind(0)))


def _weights(recipe: Recipe, members: Sequence[StoredMatrix]) -> Stacked:
    """The weights as they are stored: parameter and low part, or the parameter alone."""
    dtype, shape = recipe.made_for[:2]
    codec = _CASTS.get(dtype, Raw()) if recipe.split is None else recipe.split
    values = torch.float64 if dtype == torch.float64 else torch.float32
    return Stacked(codec, matrix_shape(tuple(shape)), values, [m.parts(_WEIGHT) for m in members])
