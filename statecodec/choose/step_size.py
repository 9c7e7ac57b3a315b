"""The size of one optimizer step of a parameter, measured on its moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
from statecodec.layouts import AdamSettings, Moments, QuantisedMoments, QuantisedState
from statecodec.parallel import ordered_map
from statecodec.progress import Meter
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
    def of(cls, pieces: Iterable[UpdateSize], moments: AdamSettings) -> StepSize | None:
        """Put it together from the sums over all elements of both moments, piece by piece; None where nothing moves.

        Rows that are rarely trained would make a sample misleading.
        """
        numel, sum_sq = 0, 0.0
        for piece in pieces:
            numel, sum_sq = numel + piece.numel, sum_sq + piece.sum_sq
        direction = math.sqrt(sum_sq / numel) if numel else 0.0
        if not direction or not math.isfinite(direction):
            return None
        correction1, correction2 = corrections(moments)
        return cls(direction * math.sqrt(correction2) / correction1, direction, stored_eps(moments))


def step_sizes(
    source: SourceCheckpoint, moments: Sequence[Moments], threads: int, meter: Meter
) -> Iterator[StepSize | None]:
    """The steps of these parameters, in order, measured on several threads, which share large parameters."""

    def measured(piece: tuple[Moments, Chunk]) -> tuple[Moments, Chunk, UpdateSize]:
        of, chunk = piece
        first, second = (source.items[source.tensors[name].index] for name in (of.exp_avg, of.exp_avg_sq))
        m, v = source.chunk(first, chunk, _first), source.chunk(second, chunk, _second)
        return of, chunk, update_size(m, v, of)

    shapes = ((of, source.items[source.tensors[of.exp_avg].index]) for of in moments)
    pieces = ((of, chunk) for of, item in shapes for chunk in iterate(Raw(), item.shape, item.dtype, _PIECE))
    sums = list[UpdateSize]()
    with ordered_map(measured, pieces, threads) as results:
        for of, chunk, size_of_piece in results:
            item = source.items[source.tensors[of.exp_avg].index]
            sums.append(size_of_piece)
            meter.add(2 * (chunk.stop - chunk.start) * item.dtype.itemsize)
            if chunk.stop == item.numel:
                yield StepSize.of(sums, of)
                sums = []


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


def update_size(m: Tensor, v: Tensor, moments: AdamSettings) -> UpdateSize:
    """The sums over a piece of both moments that `StepSize.of` puts together."""
    return kernels.host().update_size(as_fp32(m.reshape(-1)), as_fp32(v.reshape(-1)), eps=stored_eps(moments))


def stored_eps(moments: AdamSettings) -> float:
    """Adam's eps beside the root of the stored second moment, which lacks its bias correction."""
    return min(max(moments.eps * math.sqrt(corrections(moments)[1]), MIN_STEP), 1.0)


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
