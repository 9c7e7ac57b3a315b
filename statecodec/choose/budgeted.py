"""Choosing codecs within an error budget: measure every candidate, allocate, check on all of the data, adjust.

The budget is on the whole: u_rms = ||u' - u|| / ||u|| over the Adam updates of all parameters, and ||w' - w|| / ||w||
over all weights. Estimates come from samples and assume that the errors of first and second moments add up; before
anything is written, the chosen codecs run over the whole checkpoint and the true error decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from statecodec import codecs, kernels
from statecodec.checkpoint.chain import Base
from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.source import SourceCheckpoint, SourceItem
from statecodec.choose import Policy
from statecodec.choose.budget import Allocation, Allocator, CurvePoint, Option, candidates
from statecodec.choose.choices import Choice, Choices, by_rules
from statecodec.choose.measure import Sample, UpdateErrors, decoded_stream, measure, sample, settings, weight_errors
from statecodec.codecs import Codec
from statecodec.errors import UnencodableValues, UsageError, VerificationFailed
from statecodec.format.packing import Packing
from statecodec.layouts import Moments
from statecodec.parallel import default_threads, ordered_map
from statecodec.progress import Meter, Progress
from statecodec.roles import family

_MIN_NUMEL = 4096  # smaller tensors stay exact, as in the presets
_PIECE = 1 << 18
_ATTEMPTS = 6
_CLOSE = 0.97  # of the budget: not worth another pass over the checkpoint


@dataclass(frozen=True)
class Limits:
    """The budgets; None where there is none. Raises UsageError for what is not a positive number."""

    update: float | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_update_error", self.update), ("max_weight_error", self.weight)):
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise UsageError(f"{name}={value!r}: expected a positive number, such as 0.01 for one percent")

    def __bool__(self) -> bool:
        return self.update is not None or self.weight is not None

    def check(self, total: Mapping[str, float]) -> None:
        """Raise VerificationFailed if what a comparison with the source found is above a budget after all."""
        for what, key, limit in (("update", "u_rms", self.update), ("weight", "weight_relative_rms", self.weight)):
            if limit is not None and not total.get(key, math.inf) <= limit * (1 + 1e-6):
                raise VerificationFailed(f"{what} error {total.get(key)} is above the budget of {limit:g}")


@dataclass(frozen=True)
class _Unit:
    """One tensor with its options; what they cost in error is in the unit of its budget (update or weight)."""

    name: str
    options: tuple[Option, ...]


class Search:
    """Finds the codecs of one checkpoint for its budgets."""

    def __init__(
        self,
        source: SourceCheckpoint,
        choices: Choices,
        limits: Limits,
        packing: Packing,
        threads: int,
        progress: Progress | None,
        base: Base | None = None,
    ) -> None:
        """Raises UsageError if there is nothing to spend a budget on."""
        self.source, self.limits, self._packing, self._threads, self._progress = (
            source, limits, packing, threads, progress,
        )  # fmt: skip
        self._choices, self._base = choices, base
        self.pairs = source.moments
        weights = (item for item in source.items if family(item.role) == "weight")
        self._weights = [item for item in weights if item.dtype in codecs.base.FLOATS]
        if limits.update is not None and not self.pairs:
            raise UsageError("max_update_error: no pairs of exp_avg and exp_avg_sq here, so no Adam update to bound")
        if limits.weight is not None and not self._weights:
            raise UsageError("max_weight_error: no tensor of this checkpoint is known to be a weight")

    def refined(self) -> Choices:
        """The choices, with the tensors that a budget is about as the budget allows, and what was reached as notes."""
        choices = self._choices
        if self.limits.update is not None:
            found, reached = self._search(self._measure_updates(), self.limits.update, self._exact_update)
            choices = _spent(choices, found, "update", reached, self.limits.update)
        if self.limits.weight is not None:
            found, reached = self._search(self._measure_weights(), self.limits.weight, self._exact_weight)
            choices = _spent(choices, found, "weight", reached, self.limits.weight)
        return choices

    def _search(self, units: Measured, limit: float, exact: Any) -> tuple[dict[str, Codec], float]:
        """Allocate, take the true error, scale the estimate by what it was off, until it is just under the limit."""
        allocator = Allocator({u.name: u.options for u in units.units})
        best: tuple[Allocation, float] | None = None
        target, bracket = limit**2 * units.energy, [0.0, math.inf]
        for _ in range(_ATTEMPTS):
            allocation = allocator.within(target)
            reached = exact({name: o.codec for name, o in allocation.chosen.items()})
            if reached <= limit:
                bracket[0] = target
                if best is None or allocation.nbytes <= best[0].nbytes:
                    best = allocation, reached
                if reached >= _CLOSE * limit or allocation.nbytes <= min(n for n, _ in allocator.curve()):
                    break
            else:
                bracket[1] = target
            target = _next_target(target, (limit / reached) ** 2 if reached else 4.0, bracket)
        if best is None:
            best = allocator.within(0.0), exact({name: o.codec for name, o in allocator.within(0.0).chosen.items()})
            if best[1] > limit:
                raise UsageError(f"your own rules already cause an error of {best[1]:.3g}; the budget is {limit:g}")
        return {name: o.codec for name, o in best[0].chosen.items()}, best[1]

    def _measure_updates(self) -> Measured:
        meter = Meter(self._progress, sum(self._nbytes(m) for m in self.pairs), "measuring codecs")
        units, energy = [], 0.0
        with ordered_map(self._measure_pair, self.pairs, self._threads) as measured:
            for m, found, size in measured:
                units.extend(found)
                energy += size
                meter.add(self._nbytes(m))
        return Measured(units, energy)

    def _measure_pair(self, m: Moments) -> tuple[Moments, list[_Unit], float]:
        first, second = self._item(m.exp_avg), self._item(m.exp_avg_sq)
        samples = [sample(self.source, item) for item in (first, second)]
        errors = UpdateErrors(m, *samples)
        units = [
            self._unit(item, found, role, of)
            for item, found, role, of in (
                (first, samples[0], "exp_avg", errors.of_first), (second, samples[1], "exp_avg_sq", errors.of_second),
            )
        ]  # fmt: skip
        return m, units, errors.energy

    def _measure_weights(self) -> Measured:
        meter = Meter(self._progress, sum(item.nbytes for item in self._weights), "measuring codecs")
        units, energy = [], 0.0

        def one(item: SourceItem) -> tuple[SourceItem, _Unit, float]:
            found = sample(self.source, item, self._base)
            errors = weight_errors(found)
            size = errors([piece * 0 for piece in found.floats()]) * found.scale
            return item, self._unit(item, found, "weight", errors), size

        with ordered_map(one, self._weights, self._threads) as measured:
            for item, unit, size in measured:
                units.append(unit)
                energy += size if math.isfinite(size) else 0.0
                meter.add(item.nbytes)
        return Measured(units, energy)

    def _unit(self, item: SourceItem, found: Sample, role: str, errors: Any) -> _Unit:
        tried: Sequence[Codec] = self._tried(item, role, based=bool(found.before))
        options = [o for codec in tried if (o := measure(found, codec, self._packing, errors)) is not None]
        if not any(math.isfinite(o.error) for o in options):
            # Values without a finite update or square: exact, and of no weight in the sums.
            options = [Option(codecs.Raw(), float(item.nbytes), 0.0)]
        return _Unit(item.name, tuple(options))

    def _tried(self, item: SourceItem, role: str, *, based: bool) -> Sequence[Codec]:
        choice = self._choices[item.name]
        if choice.settled:
            return [choice.codec]
        if item.bytes_only or item.numel < _MIN_NUMEL or item.dtype not in codecs.base.FLOATS:
            return [codecs.Raw()]
        return [codecs.Raw(), *candidates(role, len(item.shape), based=based)]

    def _item(self, name: str) -> SourceItem:
        return self.source.items[self.source.tensors[name].index]

    def _exact_update(self, chosen: Mapping[str, Codec]) -> float:
        return self._exact(self.pairs, partial(self._pair_error, chosen), self._nbytes)

    def _exact_weight(self, chosen: Mapping[str, Codec]) -> float:
        return self._exact(self._weights, partial(self._weight_error, chosen), lambda item: item.nbytes)

    def _exact(self, work: Sequence[Any], error: Any, nbytes: Any) -> float:
        """The true relative error, over every element."""
        meter = Meter(self._progress, sum(map(nbytes, work)), "checking the error")
        total = [0.0, 0.0]
        with ordered_map(error, work, self._threads) as errors:
            for item, result in zip(work, errors, strict=True):
                total = [total[0] + result[0], total[1] + result[1]]
                meter.add(nbytes(item))
        return math.sqrt(total[1] / total[0]) if total[0] else (math.inf if total[1] else 0.0)

    def _pair_error(self, chosen: Mapping[str, Codec], m: Moments) -> tuple[float, float]:
        items = [self._item(m.exp_avg), self._item(m.exp_avg_sq)]
        raw = codecs.Raw()
        streams = [decoded_stream(self.source, item, raw) for item in items]
        streams += [decoded_stream(self.source, item, chosen[item.name]) for item in items]
        return self._compare(items[0].numel, streams, settings(m))

    def _compare(self, numel: int, streams: Sequence[Any], scalars: dict[str, float]) -> tuple[float, float]:
        energy = error = 0.0
        try:
            for start in range(0, numel, _PIECE):
                pieces = [s.take(min(_PIECE, numel - start)).to(torch.float32) for s in streams]
                m, v, m_other, v_other = pieces
                c = kernels.host().compare_updates(m, v, m_other, v_other, **scalars)
                energy, error = energy + c.sum_sq, error + c.sum_sq_diff
        except UnencodableValues:
            return energy, math.inf  # outside of the sample: this codec will not do
        return energy, error

    def _weight_error(self, chosen: Mapping[str, Codec], item: SourceItem) -> tuple[float, float]:
        pair = (codecs.Raw(), chosen[item.name])
        streams = [decoded_stream(self.source, item, codec, self._base) for codec in pair]
        energy = error = 0.0
        numel = item.numel
        try:
            for start in range(0, numel, _PIECE):
                c = kernels.host().compare(*(s.take(min(_PIECE, numel - start)) for s in streams))
                energy, error = energy + c.sum_sq, error + c.sum_sq_diff
        except UnencodableValues:
            return energy, math.inf
        return energy, error

    def _nbytes(self, m: Moments) -> int:
        return self._item(m.exp_avg).nbytes + self._item(m.exp_avg_sq).nbytes


def _spent(choices: Choices, found: Mapping[str, Codec], what: str, reached: float, limit: float) -> Choices:
    note = f"{what} error {reached:.4g} of at most {limit:g}"
    return choices.updated({name: Choice(codec, f"{what} budget {limit:g}") for name, codec in found.items()}, (note,))


@dataclass(frozen=True)
class Measured:
    """All units of one budget, and the squared size that its error is relative to."""

    units: list[_Unit]
    energy: float


def measure_curve(
    src: str | Path, *, pack: str = "zstd", threads: int | None = None, progress: Progress | None = None
) -> list[CurvePoint]:
    """Size against update error of one checkpoint, with weights as split 24 bits and as bf16; the presets as labelled
    points.

    From samples: large tensors' figures are estimates. Raises UsageError for a compressed checkpoint or one without
    Adam moments.
    """
    packing = Packing.parse(pack)
    with open_checkpoint(src) as source:
        if not isinstance(source, SourceCheckpoint):
            raise UsageError(f"{src} is compressed: its curve would be that of errors already made; give the original")
        choices = by_rules(source, Policy(()), "lossless")
        search = Search(source, choices, Limits(update=1.0), packing, threads or default_threads(), progress)
        return _curve(search, packing)


def _curve(search: Search, packing: Packing) -> list[CurvePoint]:
    measured = search._measure_updates()
    allocator = Allocator({u.name: u.options for u in measured.units})
    numel = sum(search._item(m.exp_avg).numel for m in search.pairs)
    points = []
    for weights, preset in (("split", "resume"), ("bf16", "tiny")):
        other = _other_bytes(search, {u.name for u in measured.units}, preset, packing)
        for nbytes, error in _thinned(allocator.curve()):
            points.append(_point(nbytes + other, error, measured.energy, numel, weights))
    for preset in ("lossless", "resume", "small", "tiny"):
        weights = {"lossless": "exact", "tiny": "bf16"}.get(preset, "split")
        state, error = _preset_state(search, preset, packing)
        other = _other_bytes(search, {u.name for u in measured.units}, preset, packing)
        points.append(_point(state + other, error, measured.energy, numel, weights, preset))
    return points


def _point(
    nbytes: float, error: float, energy: float, numel: int, weights: str, label: str | None = None
) -> CurvePoint:
    relative = math.sqrt(max(error, 0.0) / energy) if energy else 0.0
    return CurvePoint(round(nbytes), nbytes / max(numel, 1), relative, weights, label)


def _thinned(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Both ends, and between them points whose errors are a twentieth of a factor apart."""
    kept = [curve[0]]
    for point in curve[1:-1]:
        if point[1] > kept[-1][1] * 1.1 and point[0] < kept[-1][0]:
            kept.append(point)
    return [*kept, curve[-1]]


def _preset_state(search: Search, preset: str, packing: Packing) -> tuple[float, float]:
    """Bytes of the moments under a preset, and their joint squared update error."""
    choices = by_rules(search.source, Policy(()), preset)
    nbytes = error = 0.0
    for m in search.pairs:
        items = [search._item(m.exp_avg), search._item(m.exp_avg_sq)]
        samples = [sample(search.source, item) for item in items]
        errors = UpdateErrors(m, *samples)
        decoded = []
        for item, found in zip(items, samples, strict=True):
            codec = choices[item.name].codec
            option = measure(found, codec, packing, lambda _: 0.0)
            kept = codecs.Raw() if option is None else codec
            decoded.append([kept.encode(x).decode().reshape(-1).float() for x in found.pieces])
            nbytes += item.nbytes if option is None else option.nbytes
        error += errors.of_both(*decoded) * samples[0].scale if errors.finite else 0.0
    return nbytes, error


def _other_bytes(search: Search, moments: set[str], preset: str, packing: Packing) -> float:
    """Packed bytes of everything but the moments, under a preset, sampled."""
    choices, total = by_rules(search.source, Policy(()), preset), 0.0
    for item in search.source.items:
        if item.name not in moments:
            option = measure(sample(search.source, item), choices[item.name].codec, packing, lambda _: 0.0)
            total += item.nbytes if option is None else option.nbytes
    return total


def _next_target(target: float, factor: float, bracket: Sequence[float]) -> float:
    """The next estimate to aim at: scaled by what the last one missed, inside of what is known to work and not to."""
    proposed = target * min(max(factor * 0.995, 0.05), 4.0)
    low, high = bracket
    if low < proposed < high:
        return proposed
    return math.sqrt(low * high) if low and high < math.inf else (low * 1.5 if high == math.inf else high * 0.5)
