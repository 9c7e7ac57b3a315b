"""The budget: an error of a stated fraction of one optimizer step, the same for every tensor.

One step moves a parameter by lr * u, where u = m_hat / (sqrt(v_hat) + eps) is Adam's update direction. Its rms over a
tensor, U, is the unit of that tensor:

    exp_avg      `direction`, a grid of fraction * U * sqrt(12) in u: the error of u is the fraction, by construction
    exp_avg_sq   `logarithmic`: decoding exp_avg multiplies by the decoded root, so its error is not in u at all
    weights      `uniform`, a grid of fraction * lr * U * sqrt(12)

A uniform quantiser before an entropy coder is the best there is at these rates, and the same fraction everywhere is the
optimal allocation: nothing is searched. Where there is no step to count in, `_Chooser` says what is done instead.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from statecodec import kernels
from statecodec.buffers import Scratch
from statecodec.checkpoint.source import SourceCheckpoint, SourceItem
from statecodec.choose.choices import Choice, Choices
from statecodec.choose.presets import MIN_NUMEL
from statecodec.codecs import Direction, Dropped, Logarithmic, Raw, Split, Uniform
from statecodec.codecs.base import FLOATS
from statecodec.codecs.chunking import Chunk, iterate
from statecodec.dtypes import FLOAT32
from statecodec.errors import UsageError, VerificationFailed
from statecodec.kernels.grids import MAX_STEP, MIN_STEP
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, UpdateSize
from statecodec.layouts import Moments
from statecodec.lazy import torch
from statecodec.parallel import ordered_map
from statecodec.progress import Meter, Progress
from statecodec.roles import MOMENT_ROLES, family

if TYPE_CHECKING:
    from torch import Tensor

Values: TypeAlias = NDArray[np.float64]

_SQRT12 = math.sqrt(12.0)  # an error that is uniform over a step has an rms of step / sqrt(12)
_SAMPLE, _PIECE = 1 << 16, 1 << 11  # a larger tensor is sampled by 32 pieces, evenly spread
_SAFETY = 0.995  # of the step where the error is known from a sample
_first, _second = Scratch(), Scratch()
_TRIES = 8  # to find the step of values that do not spread over the grid's cells
_FINEST = 2.0**-16  # of the rms of the weights: as fine as the 24 bits that `split` keeps
_COARSEST = 2.0**-7  # of the largest weight: as coarse as bf16 is there


@dataclass(frozen=True)
class Budget:
    """The error of moments and of weights, as fractions of one optimizer step; None leaves them as they are.

    `asked` names the options that were given: something must be there for each of them to bound.
    """

    moments: float | None = None
    weights: float | None = None
    asked: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        preset: float | None = None,
        *,
        max_step_error: float | None = None,
        max_update_error: float | None = None,
        max_weight_error: float | None = None,
    ) -> Budget:
        """The preset's fraction, or that of `max_step_error`, unless a half has its own. Raises UsageError."""
        options = {
            "max_step_error": max_step_error,
            "max_update_error": max_update_error,
            "max_weight_error": max_weight_error,
        }
        for name, value in options.items():
            if value is not None and not (isinstance(value, int | float) and 0 < value <= 1):
                raise UsageError(
                    f"{name}={value!r}: expected a fraction of an optimizer step above 0 and up to 1, such as 0.01"
                )
        both = max_step_error if max_step_error is not None else preset
        return cls(
            max_update_error if max_update_error is not None else both,
            max_weight_error if max_weight_error is not None else both,
            tuple(name for name, value in options.items() if value is not None),
        )

    def __bool__(self) -> bool:
        return self.moments is not None or self.weights is not None

    def check(self, total: dict[str, float]) -> None:
        """Raise VerificationFailed if the update error that a comparison with the source found is above the promise."""
        found = total.get("u_rms")
        if self.moments is not None and found is not None and not found <= self.moments * 1.001:
            raise VerificationFailed(f"update error {found:.4g} of a step is above the promised {self.moments:g}")


def codes_per_octave(fraction: float) -> int:
    """Of `logarithmic`, for a step error: 8 at 1 %, 3 at 10 %, 2 at 30 %, 1 at a whole step."""
    return max(1, math.ceil(0.8 / math.sqrt(fraction) - 1e-9))


def by_steps(
    source: SourceCheckpoint,
    choices: Choices,
    budget: Budget,
    threads: int,
    progress: Progress | None = None,
    only: Container[str] | None = None,
) -> Choices:
    """The same choices, with the tensors that no rule of yours settled as fine as the budget asks.

    `only`: the names that are looked at, where not all are.

    Raises UsageError if there is nothing that a half of the budget, asked for, could bound.
    """
    _require_something(source, budget)
    chooser = _Chooser(source, choices, budget)
    wanted = [m for m in source.moments if only is None or any(n in only for n in (m.exp_avg, m.exp_avg_sq, m.weight))]
    meter = Meter(progress, sum(2 * source.tensors[m.exp_avg].nbytes for m in wanted), "measuring the step")
    with ordered_map(chooser.parameter, wanted, threads) as parameters:
        for moments, chosen in parameters:
            chooser.chosen.update(chosen)
            meter.add(2 * source.tensors[moments.exp_avg].nbytes)
    chooser.rest(only)
    return choices.updated(chooser.chosen, tuple(chooser.notes))


def _require_something(source: SourceCheckpoint, budget: Budget) -> None:
    bounds = {
        "max_update_error": ("optimizer states", MOMENT_ROLES),
        "max_weight_error": ("weights", ("weight",)),
        "max_step_error": ("weights and no optimizer states", ("weight", *MOMENT_ROLES)),
    }
    roles = {family(item.role) for item in source.items if item.dtype in FLOATS}
    for name in budget.asked:
        what, needed = bounds[name]
        if roles.isdisjoint(needed):
            raise UsageError(f"{name}: no {what} are known in {source.path}, so there is nothing to bound")


class _Chooser:
    """Chooses for one checkpoint: pairs of moments with their weights first, then what is left."""

    def __init__(self, source: SourceCheckpoint, choices: Choices, budget: Budget) -> None:
        self.source, self.choices, self.budget = source, choices, budget
        self.chosen: dict[str, Choice] = {}
        self.notes: list[str] = []
        self._paired = {name for m in source.moments for name in (m.exp_avg, m.exp_avg_sq)}
        rates = [m.lr for m in source.moments if m.lr is not None and m.lr > 0]
        self._largest_rate = max(rates, default=None)

    def parameter(self, moments: Moments) -> tuple[Moments, dict[str, Choice]]:
        """The choices for one parameter's moments and its weight."""
        first, second = self._item(moments.exp_avg), self._item(moments.exp_avg_sq)
        if first.shape != second.shape or not (self._open(first) or self._open(second)):
            return moments, {}
        unit = _Unit.measured(self.source, first, second, moments)
        chosen: dict[str, Choice] = {}
        if self.budget.moments is not None:
            if self._open(second):
                chosen[second.name] = self._second_moment(self.budget.moments)
            # A direction decodes to the same update whatever a rule of yours made of the second moment, if anything.
            if unit is not None and self._open(first) and not isinstance(self.choices[second.name].codec, Dropped):
                chosen[first.name] = self._first_moment(unit, self.budget.moments, second)
        weight = self.source.tensors.get(moments.weight) if moments.weight else None
        if weight is not None and unit is not None and self.budget.weights is not None:
            choice = self._weight(self._item(weight.name), unit, moments, self.budget.weights)
            if choice is not None:
                chosen[weight.name] = choice
        return moments, chosen

    def _first_moment(self, unit: _Unit, fraction: float, second: SourceItem) -> Choice:
        codec = Direction(_legal(_grid(unit.values, fraction * unit.direction) * _safety(second)), unit.eps)
        reason = f"{fraction:.4g} of the update's rms"
        return Choice(codec, reason, unit=unit.update / unit.direction, companions={"exp_avg_sq": second.name})

    def _second_moment(self, fraction: float) -> Choice:
        steps = codes_per_octave(fraction)
        return Choice(Logarithmic(steps), f"{steps} codes an octave, for {fraction:.4g} of a step")

    def _weight(self, item: SourceItem, unit: _Unit, moments: Moments, fraction: float) -> Choice | None:
        """A grid as fine as a fraction of the step that trains it; 24 bits where that is finer, or not known."""
        if item.dtype != FLOAT32 or not self._open(item):
            return None
        values = _finite(sampled(self.source, item))
        rms, largest = _rms(values), float(np.abs(values).max(initial=0.0))
        if not rms:
            return None
        rate = moments.lr if moments.lr is not None and moments.lr > 0 else self._largest_rate
        one_step = (rate or 0.0) * unit.update
        finest, coarsest = _FINEST * rms, max(_COARSEST * largest, _FINEST * rms)
        step = min(max(_grid(values, fraction * one_step) * _safety(item), finest), coarsest)
        reason = f"{fraction:.4g} of a step" if step not in (finest, coarsest) else "24 bits"
        return Choice(Uniform(_legal(step)), "bf16" if step == coarsest else reason, unit=one_step or None)

    def rest(self, only: Container[str] | None) -> None:
        """Tensors that no pair of moments speaks of."""
        # Weights without moments of their own: trained by moments that nobody could name, or not trained at all.
        unnamed = any(m.weight is None for m in self.source.moments) or not self.source.moments
        for item in self.source.items:
            if item.name in self.chosen or not self._open(item) or (only is not None and item.name not in only):
                continue
            choice = self._without_step(item, unnamed)
            if choice is not None:
                self.chosen[item.name] = choice

    def _without_step(self, item: SourceItem, unnamed: bool) -> Choice | None:
        if family(item.role) == "weight" and self.budget.weights is not None and item.dtype == FLOAT32:
            if not unnamed or item.role == "ema":
                return Choice(self.choices[item.name].codec, "exact: it has no moments, so no step trains it")
            return Choice(Split(high="bf16", low_bits=8), "24 bits: the step that trains it is not known")
        fraction = self.budget.moments
        if fraction is None:
            return None
        if item.role in ("exp_avg_sq", "max_exp_avg_sq"):
            return self._second_moment(fraction)
        if item.role == "momentum" or (item.role == "exp_avg" and item.name not in self._paired):
            values, size = _finite(sampled(self.source, item)), _size(self.source, item)
            step = _legal(_grid(values, fraction * size) * _safety(item))
            return Choice(Uniform(step), f"{fraction:.4g} of its rms", unit=size)
        return None

    def _item(self, name: str) -> SourceItem:
        return self.source.items[self.source.tensors[name].index]

    def _open(self, item: SourceItem) -> bool:
        choice = self.choices[item.name]
        large = item.numel >= MIN_NUMEL and item.dtype in FLOATS and not item.bytes_only
        return large and not choice.settled and not isinstance(choice.codec, Dropped)


@dataclass(frozen=True)
class _Unit:
    """One parameter's step: the rms of its update, and of the codec's own direction, which lacks bias corrections."""

    update: float
    direction: float
    eps: float
    values: Values
    """The sampled direction."""

    @classmethod
    def measured(
        cls, source: SourceCheckpoint, first: SourceItem, second: SourceItem, moments: Moments
    ) -> _Unit | None:
        """From all of the numbers: rows that are trained rarely make a sample lie. None where nothing moves."""
        step = moments.step if moments.step and moments.step > 0 else math.inf
        correction1, correction2 = correction(moments.beta1, step), correction(moments.beta2, step)
        eps = min(max(moments.eps * math.sqrt(correction2), MIN_STEP), 1.0)
        size = _update_size(source, first, second, eps)
        direction = math.sqrt(size.sum_sq / size.numel) if size.numel else 0.0
        if not direction or not math.isfinite(direction):
            return None
        m, v = sampled(source, first), sampled(source, second)
        sound = np.isfinite(m) & np.isfinite(v) & ((v > 0) | ((v == 0) & (m == 0)))
        values = m[sound] / (np.sqrt(v[sound]) + eps)
        return cls(direction * math.sqrt(correction2) / correction1, direction, eps, values)


def _size(source: SourceCheckpoint, item: SourceItem) -> float:
    """The rms of all finite values."""
    sums = NO_DIFFERENCE
    for chunk in iterate(Raw(), item.shape, item.dtype):
        x = source.chunk(item, chunk, _first).reshape(-1).to(torch.float32)
        sums = sums.merged(kernels.host().compare(x, x))
    return math.sqrt(sums.sum_sq / item.numel) if item.numel else 0.0


def _update_size(source: SourceCheckpoint, first: SourceItem, second: SourceItem, eps: float) -> UpdateSize:
    numel, sum_sq = 0, 0.0
    for chunk in iterate(Raw(), first.shape, first.dtype):
        m, v = source.chunk(first, chunk, _first), source.chunk(second, chunk, _second)
        part = kernels.host().update_size(m.reshape(-1).to(torch.float32), v.reshape(-1).to(torch.float32), eps=eps)
        numel, sum_sq = numel + part.numel, sum_sq + part.sum_sq
    return UpdateSize(numel, sum_sq)


def update_settings(moments: Moments) -> dict[str, float]:
    """Keyword arguments of `compare_updates` for one parameter."""
    step = moments.step if moments.step and moments.step > 0 else math.inf
    correction1, correction2 = correction(moments.beta1, step), correction(moments.beta2, step)
    return {"correction1": correction1, "correction2": correction2, "eps": moments.eps}


def correction(beta: float, step: float) -> float:
    """Adam's bias correction 1 - beta**step; 1 where the step is unknown or the beta is none."""
    return (1.0 - beta**step if step < math.inf and 0.0 <= beta < 1.0 else 1.0) or 1.0


def sampled(source: SourceCheckpoint, item: SourceItem) -> Values:
    """All elements of a small tensor, 32 pieces of a large one: flat, float64.

    In numpy: arrays of this size are not worth torch's threads.
    """
    if item.numel <= _SAMPLE:
        return _flat(source.chunk(item, Chunk(0, item.numel, item.shape)))
    return np.concatenate(list(_pieces(source, item)))


def _pieces(source: SourceCheckpoint, item: SourceItem) -> Iterator[Values]:
    count = _SAMPLE // _PIECE
    for i in range(count):
        start = (item.numel - _PIECE) * i // (count - 1)
        yield _flat(source.chunk(item, Chunk(start, start + _PIECE, (1, _PIECE))))


def _flat(x: Tensor) -> Values:
    flat = x.reshape(-1)
    if flat.dtype == torch.bfloat16:  # which numpy does not have
        flat = flat.to(torch.float32)
    return flat.numpy().astype(np.float64)


def _grid(values: Values, error: float) -> float:
    """The step of a grid that rounds these values with that rms error.

    error * sqrt(12) for values that spread over the grid's cells; finer for those that do not, such as the updates of
    rows that were trained once.
    """
    step = error * _SQRT12
    for _ in range(_TRIES):
        found = _rms(values - np.rint(values / step) * step) if step else 0.0
        if found <= error:
            break
        step *= 0.999 * error / found
    return step


def _safety(item: SourceItem) -> float:
    return _SAFETY if item.numel > _SAMPLE else 1.0


def _finite(x: Values) -> Values:
    return x[np.isfinite(x)]


def _rms(x: Values) -> float:
    return math.sqrt(float(np.square(x).mean())) if x.size else 0.0


def _legal(step: float) -> float:
    return min(max(step, MIN_STEP), MAX_STEP)
