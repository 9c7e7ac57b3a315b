"""An update rule over encoded states, for one parameter at a time.

An optimizer class picks a Method per parameter (FOAM folds hidden matrices and leaves vectors to Adam); a Method is
stateless: which states it keeps and how they are encoded follows from the parameter and its group, the numbers from the
group at each step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor

from statecodec import kernels
from statecodec.codecs import Codec, EncodedTensor, Raw, Split
from statecodec.dtypes import FLOAT32
from statecodec.errors import OptimizerError
from statecodec.kernels.fused import Hyper, StateStorage
from statecodec.optim import sharding, tiles, units
from statecodec.optim.weights import StoredWeight

Group: TypeAlias = dict[str, Any]
LOW = "weight_low"


@dataclass(frozen=True)
class StateSpec:
    """How one state of one parameter is stored: codec, and shape and dtype of the decoded tensor."""

    codec: Codec
    shape: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self, param: Tensor) -> EncodedTensor:
        """A state of zeros, placed as the parameter is."""
        return sharding.zeros(self.codec, self.shape, self.dtype, param)


@dataclass(frozen=True)
class Recipe:
    """What is fixed for a parameter as long as its dtype, shape and placement are: method, states, and their tiles.

    `specs` are those of the whole parameter; steps see `own_specs` and `shape`, which are this rank's part of them.
    """

    name: str | None  # as the bare model has it; None if parameters were given without names
    index: int  # position among all parameters
    method: Method
    specs: Mapping[str, StateSpec]
    own_specs: Mapping[str, StateSpec]
    shape: tuple[int, ...]  # as the states see this rank's part of the parameter (trailing dimensions may be flattened)
    split: Split | None  # how parameter and low part make up the master weight
    made_for: tuple[torch.dtype, torch.Size, torch.device, Hashable]
    across: tuple[Any, ...] = ()  # the process groups that hold parts of what a state pools

    def suits(self, param: Tensor) -> bool:
        """Whether the parameter is still what this was made for."""
        return self.made_for == made_for(param)

    @property
    def label(self) -> str | int:
        """The name of the parameter in messages."""
        return self.index if self.name is None else self.name

    @cached_property
    def low(self) -> StateSpec | None:
        """The low part of the master weight, which is kept as it is; None where there is none."""
        if self.split is None:
            return None
        shape = tuple(self.made_for[1])
        return StateSpec(Raw(), shape, self.split.parts(shape, FLOAT32)["low"].dtype.torch)

    @cached_property
    def stored(self) -> dict[str, StateSpec]:
        """All encoded states: the low part, if there is one, and the method's states."""
        return {**({} if self.low is None else {LOW: self.low}), **self.specs}

    @cached_property
    def formats(self) -> dict[str, StateStorage | None]:
        """How the states are stored, in the form that fused steps take."""
        return {k: s.codec.stored() for k, s in self.specs.items()}

    @cached_property
    def walk(self) -> tuple[tiles.Tile, ...]:
        """The tiles of this rank's part."""
        codecs = {k: s.codec for k, s in self.own_specs.items()}
        return self.method.walk(self.shape, tiles.common_align(codecs, self.shape))

    @cached_property
    def unit(self) -> int:
        """How many neighbours in a row share a stored number, and are skipped together where a step is not finite."""
        cut = {k: s.codec for k, s in self.own_specs.items() if s.codec.align(self.shape) is not None}
        return tiles.common_align(cut, self.shape)

    @cached_property
    def accesses(self) -> dict[str, tiles.Access]:
        """How each state is decoded in these tiles."""
        cut = {k: s for k, s in self.own_specs.items() if s.codec.align(self.shape) is not None}
        return {k: tiles.access(s.codec, self.walk, s.dtype) for k, s in cut.items()}


def made_for(param: Tensor) -> tuple[torch.dtype, torch.Size, torch.device, Hashable]:
    """The properties of a parameter that a recipe depends on."""
    return param.dtype, param.shape, param.device, sharding.place_of(param)


@dataclass(frozen=True)
class ParameterStep:
    """One step of what this rank holds of one parameter. `grad` is contiguous, `t` counts this step too."""

    recipe: Recipe
    weight: StoredWeight
    grad: Tensor
    states: Mapping[str, EncodedTensor]
    group: Group
    t: int
    scratch: tiles.TileBuffers
    backend: kernels.Backend
    arithmetic: ModuleType
    pooled: Tensor | None = None  # the method's `partial` of all ranks, if any other rank has a part in it

    @property
    def lr(self) -> float:
        return float(self.group["lr"])

    @property
    def decay(self) -> float:
        """The factor of decoupled weight decay."""
        return 1 - self.lr * decay_per_lr(self.group)

    def part(self, at: int, tile: tiles.Tile) -> units.TileStep:
        """Weight and states of the tile with number `at`."""
        states = [
            tiles.StateTile(k, self.states[k], how, at, self.scratch, self.backend)
            for k, how in self.recipe.accesses.items()
        ]
        return units.TileStep(self.weight, states, tile, self.recipe.unit)

    def gradient(self, tile: tiles.Tile, w: Tensor, l2: float = 0.0) -> Tensor:
        """The gradient of a tile in the weight's dtype, with `maximize` and L2 decay applied.

        It may be a view of the gradient: read only.
        """
        g = self.grad.view(-1)[tile.start : tile.stop].view(tile.rows, tile.cols)
        if g.dtype == w.dtype and not l2 and not self.group["maximize"]:
            return g
        g = self.scratch.take("grad", (tile.rows, tile.cols), w.dtype, w.device).copy_(g)
        if self.group["maximize"]:
            g.neg_()
        return g.add_(w, alpha=l2) if l2 else g


def dense_gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one. Raises OptimizerError for a sparse one."""
    grad = cast(Tensor, param.grad)
    if grad.is_sparse:
        raise OptimizerError("sparse gradients are not supported; build the embedding with sparse=False")
    return grad


def decay_per_lr(group: Group) -> float:
    """Weight decay per unit of lr: `weight_decay`, or fully decoupled `weight_decay / initial_lr`."""
    decay = float(group["weight_decay"])
    return decay / float(group["initial_lr"]) if decay and group.get("decouple_lr") else decay


class Method(ABC):
    """One update rule. `name` is stable: it is written in checkpoints and names the fused kernel."""

    name: ClassVar[str]
    whole: ClassVar[bool] = False  # whether it needs all of a matrix
    pools: tuple[int, ...] = ()
    """Dimensions along which elements are pooled into one stored number."""

    @abstractmethod
    def specs(self, param: Tensor, group: Group) -> dict[str, StateSpec]:
        """The states of this parameter, in order."""

    @property
    def kind(self) -> Any:
        """A key of the rule: parameters with the same key may be stepped together."""
        return type(self), tuple(vars(self).values())

    def partial(self, grad: Tensor, recipe: Recipe) -> Tensor:
        """This rank's term (fp32) of a sum over the ranks: what a step needs of the gradients that others hold."""
        raise NotImplementedError(self.name)

    def view_shape(self, param: Tensor) -> tuple[int, ...]:
        """The shape in which the states see the parameter."""
        return tuple(param.shape)

    def walk(self, shape: tuple[int, ...], align: int) -> tuple[tiles.Tile, ...]:
        """The tiles of a parameter; `align` is where all its codecs can be cut inside a row."""
        return tiles.tiles(shape, align)

    def init(self, param: Tensor, recipe: Recipe, group: Group) -> dict[str, EncodedTensor]:
        """States before the first step: zeros."""
        return {k: s.zeros(param) for k, s in recipe.specs.items()}

    def hyper(self, group: Group) -> Hyper | None:
        """The scalars of a fused step; None if the method has none."""
        return None

    def state_dtype(self, param: Tensor) -> torch.dtype:
        """fp32, or fp64 for fp64 parameters."""
        return torch.float64 if param.dtype == torch.float64 else torch.float32


class PerParameter(Method):
    """A method that steps one parameter at a time."""

    @abstractmethod
    def step(self, job: ParameterStep) -> int:
        """Update states and weight in place; returns how many units kept their old bytes (see `units`)."""


class Elementwise(PerParameter):
    """A method that can go tile by tile: every state aligned with the parameter, or folded along its rows."""

    @abstractmethod
    def scalars(self, job: ParameterStep) -> dict[str, Any]:
        """Keyword arguments of the arithmetic, computed once per parameter."""

    def arithmetic(self, job: ParameterStep) -> Callable[..., None]:
        """The update of one tile in place: a function of weight, gradient, the states in order, and the scalars.

        By default it is the function of this method's name in `kernels.*.steps`.
        """
        update: Callable[..., None] = getattr(job.arithmetic, self.name)
        return update

    def l2(self, group: Group) -> float:
        """Weight decay that goes through the gradient."""
        return 0.0

    def step(self, job: ParameterStep) -> int:
        arithmetic = self.arithmetic(job)
        scalars, l2 = self.scalars(job), self.l2(job.group)
        kept = 0
        for at, tile in enumerate(job.recipe.walk):
            part = job.part(at, tile)
            g = job.gradient(tile, part.weight, l2)
            arithmetic(part.weight, g, *part.values, **scalars)
            kept += part.store()
        return kept


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, everything else): how a convolution kernel is seen as a matrix."""
    return shape[0], math.prod(shape[1:])
