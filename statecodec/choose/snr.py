"""The signal-to-noise ratio of second moments, which tells which dimensions may share one value.

    SNR_K(V) = mean over the remaining dimensions of (mean_K V)**2 / var_K V        (population variance)

Everything is float64 and streamed over the first dimension. A slice of one value (zero variance) counts as +inf. A
slice without signal is skipped: all zero, or decayed below fp32's smallest normal number, as the rows of tokens that
are no longer seen are. Source: SlimAdam, arXiv 2503.01843, section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from statecodec.errors import UsageError
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Dims = tuple[int, ...]
Ratios = dict[Dims, float]

CUTOFF = 1.0  # the paper's
_MAX_NDIM = 6  # 63 subsets
_SLAB = 1 << 21  # elements held in float64 at a time
_TINY = 2.0**-126  # below fp32's normal range: no signal
_SAME = 1e-30  # var / mean**2 below which a slice is constant up to float64 rounding


def subsets(ndim: int) -> list[Dims]:
    """Every non-empty subset of the dimensions, the smallest first."""
    return [k for n in range(1, ndim + 1) for k in itertools.combinations(range(ndim), n)]


def kept(shape: Sequence[int], dims: Dims) -> int:
    """Values that remain of a tensor shared over `dims`."""
    return math.prod(n for d, n in enumerate(shape) if d not in dims) if math.prod(shape) else 0


def snr(v: Tensor) -> Ratios:
    """SNR of a second moment (any float dtype, not negative) for every subset of its dimensions.

    It is nan for a subset without any signal.
    """
    measured = Measurement(tuple(v.shape))
    for slab in slabs(v.shape):
        measured.add(v[slab[0] : slab[1]])
    return measured.ratios()


def slabs(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of the first dimension, of a bounded number of elements each (one index at least)."""
    row = max(math.prod(shape[1:]), 1)
    height = max(1, _SLAB // row)
    for start in range(0, shape[0], height):
        yield start, min(start + height, shape[0])


class Measurement:
    """SNRs of one tensor, fed with slabs of whole indices of its first dimension, in order."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Raises UsageError for more dimensions than can be enumerated, or none."""
        if not 1 <= len(shape) <= _MAX_NDIM:
            raise UsageError(
                f"the SNR is measured of tensors of 1 to {_MAX_NDIM} dimensions, not of shape {list(shape)}"
            )
        self._sums = {k: _Sums() for k in subsets(len(shape))}
        self._open: dict[Dims, _Merged] = {k: _Merged() for k in self._sums if 0 in k}

    def add(self, slab: Tensor) -> None:
        """The next indices of the first dimension."""
        values = slab.detach().to(torch.float64)
        for dims, sums in self._sums.items():
            variance, mean = torch.var_mean(values, dim=dims, correction=0)
            if dims in self._open:
                self._open[dims].add(math.prod(values.shape[d] for d in dims), mean, variance)
            else:
                sums.add(mean, variance)

    def ratios(self) -> Ratios:
        """The SNR of every subset; nan where no slice had a signal."""
        for dims, merged in self._open.items():
            if merged.count:
                self._sums[dims].add(merged.mean, merged.squares / merged.count)
        self._open = {}
        return {dims: sums.mean() for dims, sums in self._sums.items()}


class _Sums:
    """Adds up the ratios of complete slices."""

    def __init__(self) -> None:
        self.total, self.slices = 0.0, 0

    def add(self, mean: Tensor, variance: Tensor) -> None:
        signal = mean > _TINY
        square = mean[signal].square()
        variance = variance[signal]
        ratio = torch.where(variance > _SAME * square, square / variance, torch.full_like(square, math.inf))
        self.total += float(ratio.sum())
        self.slices += int(signal.sum())

    def mean(self) -> float:
        return self.total / self.slices if self.slices else math.nan


class _Merged:
    """Mean and sum of squared deviations of slices that run through several slabs (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, count: int, mean: Tensor, variance: Tensor) -> None:
        both = self.count + count
        if not both:
            return
        delta = mean - self.mean if self.count else torch.zeros_like(mean)
        self.squares = self.squares + variance * count + delta.square() * (self.count * count / both)
        self.mean = self.mean + delta * (count / both) if self.count else mean
        self.count = both


def average(measured: Iterable[Mapping[Dims, float]]) -> Ratios:
    """The mean over checkpoints of a run; a measurement without signal (nan) is left out."""
    by_dims: dict[Dims, list[float]] = {}
    for ratios in measured:
        for dims, ratio in ratios.items():
            by_dims.setdefault(dims, []).append(ratio)
    finite = {dims: [r for r in values if not math.isnan(r)] for dims, values in by_dims.items()}
    return {dims: sum(values) / len(values) if values else math.nan for dims, values in finite.items()}


def choose(ratios: Mapping[Dims, float], shape: Sequence[int], cutoff: float = CUTOFF) -> Dims:
    """The dimensions with the highest SNR strictly above the cutoff; () if there are none.

    Of equals, those that save most.
    """
    above = [(ratio, -kept(shape, dims), dims) for dims, ratio in ratios.items() if ratio > cutoff]
    return max(above, key=lambda entry: entry[:2])[2] if above else ()


@dataclass(frozen=True)
class LayerSNR:
    """The averaged SNRs of one second moment.

    `shareable` is False for vectors, norms and what else rules must leave alone.
    """

    name: str
    shape: tuple[int, ...]
    ratios: Mapping[Dims, float]
    shareable: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def dims(self, cutoff: float = CUTOFF) -> Dims:
        """What this layer's own SNR chooses."""
        return choose(self.ratios, self.shape, cutoff) if self.shareable else ()


def saved(layers: Sequence[LayerSNR], chosen: Mapping[str, Dims]) -> float:
    """The share of all second moments that need not be kept when each layer shares its chosen dimensions."""
    total = sum(layer.numel for layer in layers)
    left = sum(kept(layer.shape, chosen.get(layer.name, ())) for layer in layers)
    return 1 - left / total if total else 0.0


def cutoffs(layers: Sequence[LayerSNR]) -> list[float]:
    """Cutoffs at which a choice may change: the finite SNRs themselves, rising, and 0."""
    return sorted({0.0, *(r for layer in layers if layer.shareable for r in layer.ratios.values() if math.isfinite(r))})
