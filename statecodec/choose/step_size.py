"""The size of one optimizer step of a parameter, measured on its moments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from statecodec import kernels
from statecodec.buffers import ThreadScratch
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.codecs import Raw
from statecodec.codecs.chunking import iterate
from statecodec.kernels.grids import MIN_STEP
from statecodec.kernels.reference.statistics import UpdateSize
from statecodec.layouts import Moments
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 19  # elements that are measured at once: smaller ones cost more calls, larger ones more memory
_SMALL = 1 << 12  # elements of a sampled piece
_first, _second = ThreadScratch(), ThreadScratch()


@dataclass(frozen=True)
class StepSize:
    """One parameter's step: the rms of its update, and that of the stored direction, which lacks bias corrections."""

    update: float
    direction: float
    eps: float

    @classmethod
    def measured(
        cls, source: SourceCheckpoint, first: SourceItem, second: SourceItem, moments: Moments
    ) -> StepSize | None:
        """Measure it on all elements; None where nothing moves.

        Rows that are rarely trained would make a sample misleading.
        """
        correction1, correction2 = corrections(moments)
        eps = min(max(moments.eps * math.sqrt(correction2), MIN_STEP), 1.0)
        measured = _update_size(source, first, second, eps)
        direction = math.sqrt(measured.sum_sq / measured.numel) if measured.numel else 0.0
        if not direction or not math.isfinite(direction):
            return None
        return cls(direction * math.sqrt(correction2) / correction1, direction, eps)


def size(source: SourceCheckpoint, item: SourceItem, pieces: int = 0) -> tuple[float, float]:
    """The rms and the largest magnitude of all finite values, or of so many pieces of them, evenly spread."""
    numel, sum_sq, largest = 0, 0.0, 0.0
    for values in _spread(source, item, pieces) if pieces else _everything(source, item):
        part = kernels.host().size(values.reshape(-1).to(torch.float32))
        numel, sum_sq, largest = numel + values.numel(), sum_sq + part.sum_sq, max(largest, part.largest)
    return (math.sqrt(sum_sq / numel) if numel else 0.0), largest


def _everything(source: SourceCheckpoint, item: SourceItem) -> Iterator[Tensor]:
    return (source.chunk(item, chunk, _first) for chunk in iterate(Raw(), item.shape, item.dtype, _PIECE))


def _spread(source: SourceCheckpoint, item: SourceItem, pieces: int) -> Iterator[Tensor]:
    if item.numel <= pieces * _SMALL:
        yield from _everything(source, item)
        return
    starts = [(item.numel - _SMALL) * i // (pieces - 1) for i in range(pieces)]
    yield source.sample(item, starts, _SMALL, _first)


def _update_size(source: SourceCheckpoint, first: SourceItem, second: SourceItem, eps: float) -> UpdateSize:
    numel, sum_sq = 0, 0.0
    for chunk in iterate(Raw(), first.shape, first.dtype, _PIECE):
        m, v = source.chunk(first, chunk, _first), source.chunk(second, chunk, _second)
        part = kernels.host().update_size(m.reshape(-1).to(torch.float32), v.reshape(-1).to(torch.float32), eps=eps)
        numel, sum_sq = numel + part.numel, sum_sq + part.sum_sq
    return UpdateSize(numel, sum_sq)


def update_settings(moments: Moments) -> dict[str, float]:
    """Keyword arguments of `compare_updates` for one parameter."""
    correction1, correction2 = corrections(moments)
    return {"correction1": correction1, "correction2": correction2, "eps": moments.eps}


def corrections(moments: Moments) -> tuple[float, float]:
    """Adam's bias corrections of both moments of one parameter."""
    step = moments.step if moments.step and moments.step > 0 else math.inf
    return correction(moments.beta1, step), correction(moments.beta2, step)


def correction(beta: float, step: float) -> float:
    """Adam's bias correction 1 - beta**step; 1 where the step is unknown or beta is not within [0, 1)."""
    return (1.0 - beta**step if step < math.inf and 0.0 <= beta < 1.0 else 1.0) or 1.0
