"""The states of an optimizer's parameters: which recipe each has, made when it is first stepped, kept in step with it.

`state[p]` holds `step` and `skipped` (0-d fp32 tensors), `weight_low` (the low part of the master weight, where there
is one) and the method's states, each an EncodedTensor: a plain value that torch's cast-on-load and its iteration over
tensors leave alone.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor

from statecodec.codecs import EncodedTensor
from statecodec.errors import OptimizerError
from statecodec.names import bare_name
from statecodec.optim import sharding
from statecodec.optim.adopting import COUNTERS, adopt, fresh, in_place, recast
from statecodec.optim.load_report import ChangeLog
from statecodec.optim.method import LOW, Group, Method, Recipe, StateSpec, made_for
from statecodec.optim.options import without_numpy
from statecodec.optim.tiles import TileBuffers
from statecodec.optim.watched import Watched
from statecodec.optim.weights import split_codec


class StateKeeper(torch.optim.Optimizer):
    """The parameters of an optimizer, their groups, recipes and states, without the steps."""

    algorithm: ClassVar[str]
    # Options of the torch.optim class whose state `state_dict(dense=True)` gives, with their defaults.
    torch_options: ClassVar[dict[str, Any]] = {}
    # Whether an update depends on the shape of a parameter, not on its elements alone.
    sees_shapes: ClassVar[bool] = False
    _fused: bool | None  # as given: whether fused steps are demanded, forbidden, or used where there are any
    _backend: str | None  # as given: whose kernels encode and decode; None is the device's

    def from_torch_group(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """Options of a torch.optim group, under the names that they have here.

        Args:
            group: a group of which `takes_torch_group` says yes.

        Returns:
            Those that mean the same here.
        """
        return group

    def to_torch_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the torch.optim class that say what a group's own do.

        Args:
            group: a group of this optimizer.

        Returns:
            All that the torch.optim class needs.
        """
        return {**self.torch_options, **{k: group[k] for k in self.torch_options if k in group}}

    @abstractmethod
    def method(self, param: Tensor, name: str | None, group: Group) -> Method:
        """The update rule for one parameter.

        Args:
            param: The parameter.
            name: Its name as the bare model has it; None if it was given without one.
            group: The group that it belongs to.

        Returns:
            The rule.

        Raises:
            OptimizerError: If this optimizer cannot step such a parameter.
        """

    @abstractmethod
    def settle_group(self, group: Group) -> None:
        """Bring options into the form that is kept; refuse options and parameters that this class cannot take.

        Subclasses extend it.

        Args:
            group: A param group with all options set; changed.

        Raises:
            OptimizerError: For the first of them that is wrong.
        """

    def takes_torch_group(self, group: Mapping[str, Any]) -> bool:
        """Whether the options of a torch.optim group mean the same here.

        Args:
            group: A saved param group of a torch.optim class.

        Returns:
            True if they do.
        """
        return False

    def accept_group(self, group: Group) -> None:
        """Bring a group's options into the form they are kept in. Raises OptimizerError."""
        for key, value in group.items():
            if key != "params":
                group[key] = without_numpy(value)
        self.settle_group(group)

    def recipe(self, p: Tensor, group: Group) -> Recipe:
        """Method, codecs and tiles of one parameter.

        They are made before its first step, and again when its dtype, shape or device has changed.
        """
        kept = self._recipes.get(p)
        if kept is not None and kept.suits(p):
            return kept
        index, name = self._position(p)
        method = self.method(p, name, group)
        specs = method.specs(p, group)
        if method.whole and sharding.cut_times(p) > 1:
            raise OptimizerError(
                f"{index if name is None else name}: {type(self).__name__} needs all of a hidden matrix, and this one "
                f"is cut along {sharding.cut_times(p)} dimensions of the mesh, where one is supported; use another "
                "optimizer, or matrix=False for a group of such parameters"
            )
        own_specs = {k: StateSpec(s.codec, sharding.local_shape(p, s.shape), s.dtype) for k, s in specs.items()}
        self._recipes[p] = recipe = Recipe(
            name,
            index,
            method,
            specs,
            own_specs,
            method.view_shape(sharding.local(p)),
            split_codec(p.dtype, group["master_weights"]),
            made_for(p),
            sharding.groups_across(p, method.pools),
        )
        return recipe

    def ensure_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        """The states of one parameter as its recipe has them.

        They are created on its first step. What somebody else wrote into `state` (torch's plain tensors, or the plain
        form of encoded ones) is encoded, and what no longer fits the parameter (`model.to(dtype)`) is converted; a
        warning says what got lost by that. Raises OptimizerError for states of another shape.
        """
        recipe = self.recipe(p, group)
        state: dict[str, Any] = self.state[p]
        seen = self._seen.get(p)
        if seen is not None and seen[0] is recipe and all(state.get(k) is v for k, v in seen[1]):
            return state
        cast = seen is not None and seen[0].split != recipe.split
        if not state:
            state = self.state[p] = Watched(fresh(recipe, p, group))
        elif cast or not in_place(state, recipe, p):
            state = self.state[p] = Watched(self._brought_over(p, group, recipe, seen[0] if seen and cast else None))
        self._seen[p] = recipe, tuple((k, state[k]) for k in (*COUNTERS, *recipe.stored))
        return state

    def group_of(self, p: Tensor) -> Group:
        """The group that a parameter belongs to. Raises OptimizerError if it belongs to none."""
        if p not in self._groups:
            self._find_positions()
        if p not in self._groups:
            raise OptimizerError("this parameter belongs to none of the optimizer's groups")
        return self._groups[p]

    def parameters(self) -> list[Tensor]:
        """The parameters of all groups, in order."""
        return [p for group in self.param_groups for p in group["params"]]

    def name(self, p: Tensor) -> str | None:
        """A parameter's name as the bare model has it; None if it was given without one."""
        return self._position(p)[1]

    def position(self, p: Tensor) -> int:
        """A parameter's position among all."""
        return self._position(p)[0]

    def label(self, p: Tensor) -> str | int:
        """What to call a parameter: its name, or its position among all."""
        index, name = self._position(p)
        return index if name is None else name

    def state_nbytes(self) -> int:
        """Bytes of everything this optimizer keeps on this rank: encoded states, low parts, counters."""
        values = (v for state in self.state.values() for v in state.values())
        held = (t for v in values for t in (v.parts.values() if isinstance(v, EncodedTensor) else (v,)))
        return sum(sharding.local(t).nbytes for t in held if isinstance(t, Tensor))

    def _brought_over(self, p: Tensor, group: Group, recipe: Recipe, before: Recipe | None) -> dict[str, Any]:
        """States that do not fit the recipe, made to fit.

        `before` is the recipe that they fitted until the parameter was cast to another dtype.
        """
        log, values = ChangeLog(), dict(self.state[p])
        if before is not None:
            values |= self._low_after_cast(p, recipe, before, values.pop(LOW, None))
        states = adopt(recipe, p, group, values, group, log)
        if not log.report().exact:
            warnings.warn(f"states that did not fit were converted: {log.report()}", stacklevel=2)
        return states

    def _low_after_cast(
        self, p: Tensor, recipe: Recipe, before: Recipe, low: EncodedTensor | None
    ) -> Mapping[str, EncodedTensor]:
        if before.split is not None and isinstance(low, EncodedTensor):
            carried = recast(p, before.split, low, recipe)
            if carried is not None:
                return carried
            warnings.warn(
                f"{recipe.label} was cast to {p.dtype} and changed besides: the low part of its master weight is "
                "dropped",
                stacklevel=2,
            )
        return {} if recipe.low is None else {LOW: recipe.low.zeros(p)}

    # --- what is not part of the state

    def _reset_runtime(self) -> None:
        """Forget everything that can be found out again."""
        self._recipes: dict[Tensor, Recipe] = {}
        # For each parameter, the states that were found to fit its recipe: until they are replaced they need no check.
        self._seen: dict[Tensor, tuple[Recipe, tuple[tuple[str, Any], ...]]] = {}
        self._scratch = TileBuffers()
        self._launches: dict[Any, Any] = {}  # prepared fused steps, which `fusing` keeps here
        self._positions: dict[Tensor, tuple[int, str | None]] = {}
        self._groups: dict[Tensor, Group] = {}

    def _position(self, p: Tensor) -> tuple[int, str | None]:
        if p not in self._positions:
            self._find_positions()
        return self._positions[p]

    def _find_positions(self) -> None:
        """Number and name the parameters of all groups, also of those that were put in by hand."""
        positions: dict[Tensor, tuple[int, str | None]] = {}
        groups: dict[Tensor, Group] = {}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            self.accept_group(group)
            for p, name in zip_longest(group["params"], group.get("param_names", ())):
                if p is not None:
                    positions[p] = len(positions), None if name is None else bare_name(name)
                    groups[p] = group
        self._positions, self._groups, self._launches = positions, groups, {}
        self._recipes = {p: r for p, r in self._recipes.items() if positions.get(p) == (r.index, r.name)}
        self._seen = {p: s for p, s in self._seen.items() if p in positions}
