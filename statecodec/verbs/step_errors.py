"""Errors in optimizer steps: of moments, of the weights that they train, of the averages that go after these."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from statecodec.checkpoint.base import Checkpoint, TensorInfo
from statecodec.checkpoint.report import TensorDiff
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.choose.averages import followed
from statecodec.choose.step_size import StepSize, largest_rate, momentum_update, quantised_step, rate
from statecodec.kernels.reference.statistics import Comparison
from statecodec.layouts import Moments
from statecodec.parallel import ordered_map

TRAINED_ROLES = ("weight", "master")
"""Of what a step trains; averages only follow it."""


class StepErrors:
    """Errors over all tensors, in optimizer steps, added up tensor by tensor."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        """Squared error and squared size, by name."""

    def add(self, name: str, error: float, size: float) -> None:
        """Add the squared error and the squared size of one tensor."""
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before[0] + error, before[1] + size

    def figures(self) -> dict[str, float] | None:
        """Relative errors by name; None if there are none."""
        errors = {name: math.sqrt(error / size) for name, (error, size) in self.sums.items() if size}
        return errors or None


class MeasuredSteps:
    """The steps of a checkpoint, in which the errors of another's tensors are counted.

    A first moment has the rms of its update as its unit, or without a second moment its own, a weight one step of what
    trains it, an average the step of the weight that it follows.
    """

    def __init__(self, exact: Checkpoint) -> None:
        self._exact = exact
        self._averages: dict[str, list[str]] = defaultdict(list)
        for average, weight in followed(exact, small=True).items():
            self._averages[weight].append(average)
        self._adam_rate = largest_rate((*exact.moments, *exact.quantised))
        self._momenta = {m.momentum: m for m in exact.momenta}
        self._momentum_rate = largest_rate(exact.momenta)
        self._step_sizes: dict[str, float] = {}
        self._of_updates: dict[str, float] = {}
        self._totals = StepErrors()
        self._others_differ = False

    def add_tensor(self, tensor: TensorInfo, compared: Comparison) -> None:
        """Learn from a tensor what step it makes, if it is a momentum that trains a weight on its own."""
        single = self._momenta.get(tensor.name)
        if single is not None:
            rms = math.sqrt(compared.sum_sq / max(tensor.numel, 1))
            self._trains(single.weight, rate(single.lr, self._momentum_rate) * momentum_update(single, rms))

    def add_update(self, moments: Moments, unit: StepSize | None, error: float) -> None:
        """Learn from a pair of moments what step it makes; `error` is that of its update, in units of the update."""
        self._of_updates[moments.exp_avg] = error
        if moments.weight is not None and unit is not None:
            self._trains(moments.weight, rate(moments.lr, self._adam_rate) * unit.update)

    def add_quantised(self, threads: int) -> None:
        """Learn the steps of weights whose moments another package keeps quantised."""
        exact = self._exact
        if isinstance(exact, SourceCheckpoint):
            with ordered_map(lambda m: (m, quantised_step(exact, m)), exact.quantised, threads) as units:
                for moments, unit in units:
                    if unit is not None:
                        self._trains(moments.weight, rate(moments.lr, self._adam_rate) * unit.update)

    def _trains(self, weight: str, step: float) -> None:
        if step > 0:
            self._step_sizes.update(dict.fromkeys((weight, *self._averages.get(weight, ())), step))

    def counted(self, tensors: Iterable[TensorDiff]) -> tuple[TensorDiff, ...]:
        """The same tensors with their errors in steps, once all tensors and updates were added."""
        return tuple(replace(tensor, step_error=self._error(tensor)) for tensor in tensors)

    def _error(self, tensor: TensorDiff) -> float | None:
        numel, step = math.prod(tensor.shape), self._step_sizes.get(tensor.name)
        if tensor.name in self._exact.lone_momenta:
            self._totals.add("momentum_step_error", numel * tensor.relative_rms**2, numel)
            return tensor.relative_rms
        if step is None:
            self._others_differ |= tensor.role in TRAINED_ROLES and tensor.rms != 0
            return self._of_updates.get(tensor.name)
        if tensor.role in TRAINED_ROLES:
            self._totals.add("weight_step_error", numel * (tensor.rms / step) ** 2, numel)
        return tensor.rms / step

    def total(self) -> dict[str, float]:
        """The errors over all tensors that have a step; not of weights where only others differ."""
        figures = self._totals.figures() or {}
        if self._others_differ and not figures.get("weight_step_error"):
            figures.pop("weight_step_error", None)
        return figures
