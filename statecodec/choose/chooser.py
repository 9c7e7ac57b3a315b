"""Codecs by the budget: errors of stated fractions of one optimizer step, the same for every tensor.

One step moves a parameter by lr * u, where u = m_hat / (sqrt(v_hat) + eps) is Adam's update direction. Its rms over a
tensor, U, is the unit of that tensor:

    exp_avg      `direction`, a grid of fraction * U * sqrt(12) in u: the error of u is the fraction, by construction
    exp_avg_sq   `logarithmic`: decoding exp_avg multiplies by the decoded root, so its error is not in u at all
    weights      `uniform`, a grid of fraction * lr * U * sqrt(12)
    averages     the same grid as the weights that they go after
    momenta      `uniform`, without second moments: a fraction of their own rms, which is what SGD's step multiplies by
                 lr; Lion's steps are lr, Muon's lr times its orthogonal update

A uniform quantiser before an entropy coder is the best there is at these rates, and among the moments, as among the
weights, the same fraction everywhere is the optimal allocation: nothing is searched. That the fraction is kept is not
left to the formula: encoding sums the error that it makes, and a tensor whose values do not spread over the grid's
cells is encoded again on a finer one (`widths.finer`).
Where there is no step to count in, `_Chooser` says what is done instead.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.choose.averages import followed
from statecodec.choose.bounded import has_grid, is_open, require_something
from statecodec.choose.budget import Budget, codes_for_the_root, codes_per_octave
from statecodec.choose.choices import Choice, Choices
from statecodec.choose.shortfalls import Shortfall, Why
from statecodec.choose.step_size import (
    StepSize,
    largest_rate,
    momentum_update,
    quantised_step,
    rate,
    root_mean_squares,
    sampled_size,
    step_sizes,
)
from statecodec.choose.widths import ROUNDED, SQRT12, legal, narrow, width_for
from statecodec.codecs import Codec, Direction, Dropped, Encoding, Following, Logarithmic, Raw, Split, Uniform
from statecodec.dtypes import FLOAT32
from statecodec.kernels.grids import MAX_PER_OCTAVE
from statecodec.layouts import AdamSettings, Moments, Momentum, QuantisedMoments
from statecodec.parallel import ordered_map
from statecodec.progress import Meter, Progress
from statecodec.roles import MOMENT_ROLES, family

_SOME = 16  # pieces of a tensor that are sampled where no promise depends on it
_FINEST = 2.0**-16  # finest grid, in the rms of the weights: as fine as the 24 bits of `split`
_ORTHOGONAL = 0.3  # share of the fraction for Muon's momenta, whose small values its update amplifies
_SOUND = 15 / 16  # share of elements that have an update, below which moments are kept as they are
_SPLIT24 = Split(high="bf16", low_bits=8)
_COARSEST = 2.0**-7  # coarsest grid, in the largest weight: as coarse as bf16 there


def by_budget(
    source: SourceCheckpoint,
    choices: Choices,
    budget: Budget,
    threads: int,
    progress: Progress | None = None,
    only: Container[str] | None = None,
) -> Choices:
    """The same choices, with tensors that no rule of the caller settled stored as finely as the budget asks.

    `only`: the names that are looked at, where not all are.

    Raises UsageError if an option of the budget finds no tensor to bound.
    """
    require_something(source, choices, budget)
    chooser = _Chooser(source, choices, budget)
    asked = (m for m in source.moments if only is None or any(n in only for n in (m.exp_avg, m.exp_avg_sq, m.weight)))
    pairs = [m for m in asked if chooser.measures(m)]
    alone = chooser.momenta(only)
    nbytes = sum(2 * source.tensors[m.exp_avg].nbytes for m in pairs) + sum(item.nbytes for item in alone)
    meter = Meter(progress, nbytes, "measuring the step")
    units = list(step_sizes(source, pairs, threads, meter))
    chooser.rms = dict(zip((m.name for m in alone), root_mean_squares(source, alone, threads, meter), strict=True))
    for moments, unit in zip(pairs, units, strict=True):  # several threads would only wait for each other
        chooser.chosen.update(chooser.parameter(moments, unit))
    beside = [m for m in source.quantised if only is None or m.weight in only]
    with ordered_map(chooser.beside_quantised, beside, threads) as weights:
        for chosen in weights:
            chooser.chosen.update(chosen)
    largest = largest_rate(source.momenta)
    for single in source.momenta:
        if only is None or single.weight in only:
            chooser.chosen.update(chooser.single(single, largest))
    chooser.rest(only)
    return choices.updated(chooser.chosen)


class _Chooser:
    """Chooses for one checkpoint: pairs of moments with their weights first, then the rest."""

    def __init__(self, source: SourceCheckpoint, choices: Choices, budget: Budget) -> None:
        self.source, self.choices, self.budget = source, choices, budget
        self.chosen: dict[str, Choice] = {}
        self.rms: dict[str, float] = {}
        """Of momenta, by name."""
        self._amsgrad = any(item.role == "max_exp_avg_sq" for item in source.items)
        self._momenta = {m.momentum: m for m in source.momenta}
        self._largest_rate = largest_rate((*source.moments, *source.quantised))
        self._followed = followed(source)
        self._one_step: dict[str, float] = {}
        """Of weights, by name."""

    def measures(self, moments: Moments) -> bool:
        """Whether anything depends on the step of a parameter."""
        first, second = self._item(moments.exp_avg), self._item(moments.exp_avg_sq)
        weight = self._item(moments.weight) if moments.weight else first
        return first.shape == second.shape and any(self._open(item) for item in (first, second, weight))

    def parameter(self, moments: Moments, unit: StepSize | None) -> dict[str, Choice]:
        """The choices for one parameter's moments and its weight, by its step."""
        chosen: dict[str, Choice] = {}
        if self.budget.moments is not None:
            first, second = self._item(moments.exp_avg), self._item(moments.exp_avg_sq)
            chosen = self._pair(first, second, unit, self.budget.moments)
        if moments.weight and unit is not None:
            chosen.update(self._trained(self._item(moments.weight), moments, unit))
        return chosen

    def _pair(self, first: SourceItem, second: SourceItem, unit: StepSize | None, fraction: float) -> dict[str, Choice]:
        """The choices for a pair of moments."""
        exactly = underflowed = None
        if unit is not None and narrow(first, 1.0) > fraction * ROUNDED:
            exactly = f"exact: {first.dtype} is hardly finer than {fraction:.4g} of a step"
        elif unit is not None and unit.numel < _SOUND * first.numel:
            underflowed = Shortfall(Why.UNDERFLOWED)
            exactly = f"exact: {first.numel - unit.numel} of {first.numel} elements have no update, as v is 0 there"
        if exactly:
            kept = {i.name: self.choices[i.name].encoding for i in (first, second) if self._open(i)}
            return {name: Choice(encoding, exactly, shortfall=underflowed) for name, encoding in kept.items()}
        chosen: dict[str, Choice] = {}
        if self._open(second):
            by_rule = unit is not None and self.choices[first.name].settled
            chosen[second.name] = self._second_beside(fraction) if by_rule else self._second_moment(fraction)
        # A direction decodes to the same update whatever a caller's rule did to the second moment.
        if unit is not None and self._open(first) and not isinstance(self.choices[second.name].codec, Dropped):
            chosen[first.name] = self._first_moment(first, unit, fraction, second)
        return chosen

    def beside_quantised(self, moments: QuantisedMoments) -> dict[str, Choice]:
        """The choice for a weight whose moments another package keeps quantised: they are kept, and tell its step."""
        weight = self._item(moments.weight)
        if not self._open(weight) or self.budget.weights is None:
            return {}
        unit = quantised_step(self.source, moments)
        return {} if unit is None else self._trained(weight, moments, unit)

    def _trained(self, weight: SourceItem, settings: AdamSettings, unit: StepSize) -> dict[str, Choice]:
        """The choice for a weight that Adam trains."""
        if self.budget.weights is None:
            return {}
        return self._moved(weight, settings.lr, self._largest_rate, unit.update, self.budget.weights)

    def _moved(
        self, weight: SourceItem, lr: float | None, largest: float, update: float, fraction: float
    ) -> dict[str, Choice]:
        """The choice for a weight that is moved by a learning rate times an update."""
        one_step = rate(lr, largest) * update
        choice = self._weight(weight, one_step, fraction)
        if one_step:
            self._one_step[weight.name] = one_step
        elif choice is not None:
            choice = replace(choice, shortfall=Shortfall(Why.NO_RATE if lr is None else Why.RATE_IS_ZERO))
        return {} if choice is None else {weight.name: choice}

    def momenta(self, only: Container[str] | None) -> list[SourceItem]:
        """The momenta whose size is a step, or the unit of their own error."""
        asked = [m for m in self.source.momenta if only is None or m.weight in only]
        names = {m.momentum for m in asked if m.update is None and self._has_own_step(self._item(m.weight))}
        if self.budget.moments is not None:
            items = (i for i in self.source.items if only is None or i.name in only)
            names |= {i.name for i in items if self._is_alone(i) and self._open(i)}
        return [i for i in self.source.items if i.name in names]

    def _has_own_step(self, weight: SourceItem) -> bool:
        return self.budget.weights is not None and weight.dtype == FLOAT32 and self._open(weight)

    def _is_alone(self, item: SourceItem) -> bool:
        return item.name in self.source.lone_momenta

    def single(self, single: Momentum, largest: float) -> dict[str, Choice]:
        """The choice for a weight that is trained by a momentum without a second moment."""
        item, fraction = self._item(single.weight), self.budget.weights
        if fraction is None or not self._has_own_step(item):
            return {}
        update = momentum_update(single, self.rms.get(single.momentum, 0.0))
        return self._moved(item, single.lr, largest, update, fraction) if update else {}

    def _first_moment(self, first: SourceItem, unit: StepSize, fraction: float, second: SourceItem) -> Choice:
        most = fraction * unit.direction
        codec = Direction(width_for(most, first, unit.direction), unit.eps)
        reason = f"{fraction:.4g} of the update's rms"
        companions = {"exp_avg_sq": second.name}
        return Choice(Encoding(codec), reason, unit=unit.direction, most=most, step=unit, companions=companions)

    def _second_moment(self, fraction: float) -> Choice:
        per_octave = codes_per_octave(fraction)
        return Choice(Encoding(Logarithmic(per_octave)), f"{per_octave} codes an octave, for {fraction:.4g} of a step")

    def _second_beside(self, fraction: float) -> Choice:
        """For a second moment beside a first one that is no direction: the update has all of its root's error."""
        per_octave = codes_for_the_root(fraction)
        if per_octave > MAX_PER_OCTAVE:
            return Choice(Encoding(Raw()), f"exact: {fraction:.4g} of a step is finer than its codes")
        return Choice(
            Encoding(Logarithmic(per_octave)), f"{per_octave} codes an octave: a root within {fraction:.4g} of a step"
        )

    def _weight(self, item: SourceItem, one_step: float, fraction: float) -> Choice | None:
        """A grid as fine as a fraction of the step that trains the weight; 24 bits where that is finer, or unknown."""
        if item.dtype != FLOAT32 or not self._open(item):
            return None
        rms, largest = sampled_size(self.source, item, _SOME)  # only for bounds: the step comes from the moments
        if not rms:
            return None
        finest, coarsest = _finest(rms), legal(max(_COARSEST * largest, _FINEST * rms))
        most = fraction * one_step
        step = min(max(width_for(most, item, rms), finest), coarsest)
        if step == finest:
            error = finest / SQRT12
            coarse = Shortfall(Why.COARSE, error / one_step) if 0 < most < error else None
            return Choice(Encoding(Uniform(step)), "24 bits", unit=one_step or None, shortfall=coarse)
        reason = "bf16" if step == coarsest else f"{fraction:.4g} of a step"
        return Choice(Encoding(Uniform(step)), reason, unit=one_step, most=most)

    def rest(self, only: Container[str] | None) -> None:
        """The choices for tensors that belong to no pair of moments."""
        untold = self._untold()
        for item in self.source.items:
            if item.name in self.chosen or not self._open(item) or (only is not None and item.name not in only):
                continue
            choice = self._without_step(item, untold)
            if choice is not None:
                self.chosen[item.name] = choice

    def _untold(self) -> Why | None:
        """Why a weight without moments may be trained all the same; None if such weights are not trained."""
        trained, items = self.source.trained, self.source.items
        alone = [i for i in items if self._is_alone(i) and i.name not in self._momenta]
        if None in trained or any(i.param is None for i in alone):
            return Why.UNMATCHED
        if trained and not alone:
            return None
        states = any(i.role in (*MOMENT_ROLES, "step") or ".state." in f".{i.name}" for i in items)
        return Why.NO_UPDATE if states else Why.NO_MOMENTS

    def _without_step(self, item: SourceItem, untold: Why | None) -> Choice | None:
        if family(item.role) == "weight" and self.budget.weights is not None and item.dtype == FLOAT32:
            weight = self._followed.get(item.name)
            if weight is not None and weight in self._one_step:
                return self._weight(item, self._one_step[weight], self.budget.weights)
            exact = self.choices[item.name].encoding
            if item.name in self.source.trained:
                return Choice(exact, "exact: its moments tell no step")
            if untold is None or item.role == "ema":
                return Choice(exact, "exact: it has no moments, so no step trains it")
            reason = "24 bits: the step that trains it is not known"
            return Choice(Encoding(_SPLIT24), reason, shortfall=Shortfall(untold))
        fraction = self.budget.moments
        if fraction is None:
            return None
        if item.role in ("exp_avg_sq", "max_exp_avg_sq"):
            alone = item.role == "exp_avg_sq" and not self._amsgrad
            choice = self._second_moment(fraction)
            return replace(choice, shortfall=Shortfall(Why.SECOND_ALONE)) if alone else choice
        if self._is_alone(item):
            single = self._momenta.get(item.name)
            if single is not None and single.orthogonal:
                fraction *= _ORTHOGONAL
            rms = self.rms[item.name]
            if not rms:  # all zeros stay exact
                return None
            most = fraction * rms
            encoding = Encoding(Uniform(width_for(most, item, rms)))
            return Choice(encoding, f"{fraction:.4g} of its rms", unit=rms, most=most)
        return None

    def _item(self, name: str) -> SourceItem:
        return self.source.items[self.source.tensors[name].index]

    def _open(self, item: SourceItem) -> bool:
        return has_grid(item) and is_open(self.choices[item.name])


def is_finest(source: SourceCheckpoint, item: SourceItem, codec: Codec) -> bool:
    """Whether a weight is stored in 24 bits, which no budget makes finer."""
    if isinstance(codec, Uniform | Following):
        rms, _ = sampled_size(source, item, _SOME)
        return codec.step <= _finest(rms) * (1 + 1e-6)
    return codec == _SPLIT24


def _finest(rms: float) -> float:
    return legal(_FINEST * rms)
