"""The size of one optimizer step of a parameter, measured on its moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from statecodec import kernels
from statecodec.buffers import ThreadScratch
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.codecs import Raw
from statecodec.codecs.chunking import Chunk, iterate
from statecodec.elementwise import as_fp32
from statecodec.errors import MalformedCheckpoint
from statecodec.kernels.grids import MIN_STEP
from statecodec.kernels.reference.statistics import UpdateSize
from statecodec.layouts import AdamSettings, QuantisedMoments, QuantisedState
from statecodec.quantised import Blocks

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 19  # elements that are measured at once: smaller ones cost more calls, larger ones more memory
_SMALL = 1 << 12  # elements of a sampled piece
_TABLE = 1 << 16  # most entries of what codes stand for
_first, _second = ThreadScratch(), ThreadScratch()


@dataclass(frozen=True)
class StepSize:
    """One parameter's step: the rms of its update, and that of the stored direction, which lacks bias corrections."""

    update: float
    direction: float
    eps: float

    @classmethod
    def measured(cls, values: Iterable[tuple[Tensor, Tensor]], moments: AdamSettings) -> StepSize | None:
        """Measure it on all elements of both moments, which come piece by piece; None where nothing moves.

        Rows that are rarely trained would make a sample misleading.
        """
        correction1, correction2 = corrections(moments)
        eps = min(max(moments.eps * math.sqrt(correction2), MIN_STEP), 1.0)
        measured = _update_size(values, eps)
        direction = math.sqrt(measured.sum_sq / measured.numel) if measured.numel else 0.0
        if not direction or not math.isfinite(direction):
            return None
        return cls(direction * math.sqrt(correction2) / correction1, direction, eps)


def size(source: SourceCheckpoint, item: SourceItem, pieces: int = 0) -> tuple[float, float]:
    """The rms and the largest magnitude of all finite values, or of so many pieces of them, evenly spread."""
    numel, sum_sq, largest = 0, 0.0, 0.0
    for values in _spread(source, item, pieces) if pieces else _everything(source, item):
        part = kernels.host().size(as_fp32(values.reshape(-1)))
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


def stored_moments(source: SourceCheckpoint, first: SourceItem, second: SourceItem) -> Iterator[tuple[Tensor, Tensor]]:
    """Both moments of a parameter, piece by piece, in scratch memory."""
    for chunk in iterate(Raw(), first.shape, first.dtype, _PIECE):
        yield source.chunk(first, chunk, _first), source.chunk(second, chunk, _second)


def quantised_moments(source: SourceCheckpoint, moments: QuantisedMoments) -> Iterator[tuple[Tensor, Tensor]]:
    """The same of moments that another package keeps quantised. Raises MalformedCheckpoint if they do not decode."""
    return zip(*(_dequantised(source, state) for state in (moments.exp_avg, moments.exp_avg_sq)), strict=True)


def _dequantised(source: SourceCheckpoint, state: QuantisedState) -> Iterator[Tensor]:
    """A quantised state, piece by piece."""

    def item(name: str) -> SourceItem:
        return source.items[source.tensors[name].index]

    codes, scales = item(state.codes), item(state.scales)
    table = None if state.table is None else item(state.table)
    numel, in_a_byte = math.prod(state.shape), 8 // state.bits
    if codes.numel * in_a_byte != numel or (table is not None and table.numel > _TABLE):
        raise MalformedCheckpoint(f"{codes.name}: {codes.numel} codes for {numel} numbers")
    blocks = Blocks(state.package, state.bits, state.shape, scales.numel)
    if blocks.size is None or _PIECE % blocks.size:
        raise MalformedCheckpoint(f"{codes.name}: {scales.numel} scales for {numel} numbers")
    meaning = None if table is None else source.chunk(table, Chunk(0, table.numel, table.shape))

    def part(of: SourceItem, start: int, stop: int) -> Tensor:
        return source.chunk(of, Chunk(start, stop, (stop - start,)))

    for start in range(0, numel, _PIECE):
        stop = min(start + _PIECE, numel)
        own = part(scales, start // blocks.size, -(-stop // blocks.size))
        yield blocks.decode(codes.name, part(codes, start // in_a_byte, stop // in_a_byte), own, meaning)


def _update_size(values: Iterable[tuple[Tensor, Tensor]], eps: float) -> UpdateSize:
    numel, sum_sq = 0, 0.0
    for m, v in values:
        part = kernels.host().update_size(as_fp32(m.reshape(-1)), as_fp32(v.reshape(-1)), eps=eps)
        numel, sum_sq = numel + part.numel, sum_sq + part.sum_sq
    return UpdateSize(numel, sum_sq)


def update_settings(moments: AdamSettings) -> dict[str, float]:
    """Keyword arguments of `compare_updates` for one parameter."""
    correction1, correction2 = corrections(moments)
    return {"correction1": correction1, "correction2": correction2, "eps": moments.eps}


def corrections(moments: AdamSettings) -> tuple[float, float]:
    """Adam's bias corrections of both moments of one parameter."""
    step = moments.step if moments.step and moments.step > 0 else math.inf
    return correction(moments.beta1, step), correction(moments.beta2, step)


def correction(beta: float, step: float) -> float:
    """Adam's bias correction 1 - beta**step; 1 where the step is unknown or beta is not within [0, 1)."""
    return (1.0 - beta**step if step < math.inf and 0.0 <= beta < 1.0 else 1.0) or 1.0
