"""The size of one optimizer step of a parameter, measured on its moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from statecodec import kernels
from statecodec.buffers import ThreadScratch
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.codecs.chunking import Chunk
from statecodec.elementwise import as_fp32
from statecodec.errors import MalformedCheckpoint
from statecodec.kernels.grids import MIN_STEP
from statecodec.kernels.reference.statistics import Size, UpdateSize
from statecodec.layouts import AdamSettings, Moments, Momentum, QuantisedMoments, QuantisedState
from statecodec.parallel import ordered_map
from statecodec.progress import Meter
from statecodec.quantised import Blocks

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 19  # elements that are measured at once: smaller ones cost more calls, larger ones more memory
_SMALL = 1 << 12  # elements of a sampled piece
_TABLE = 1 << 16  # most entries of what codes stand for
_scratch = ThreadScratch()
T = TypeVar("T")


@dataclass(frozen=True)
class StepSize:
    """One parameter's step.

    `update`: the rms of its update. `direction`: that of the stored direction, which lacks bias corrections. `eps`: of
    the direction. `numel`: how many elements have an update.
    """

    update: float
    direction: float
    eps: float
    numel: int

    @classmethod
    def of(cls, pieces: Iterable[UpdateSize], moments: AdamSettings) -> StepSize | None:
        """Put it together from the sums over all elements of both moments, piece by piece; None where nothing moves.

        Rows that are rarely trained would make a sample misleading.
        """
        numel, sum_sq = 0, 0.0
        for piece in pieces:
            numel, sum_sq = numel + piece.numel, sum_sq + piece.sum_sq
        direction = _rms(sum_sq, numel)
        if not direction or not math.isfinite(direction):
            return None
        correction1, correction2 = corrections(moments)
        return cls(direction * math.sqrt(correction2) / correction1, direction, stored_eps(moments), numel)


def step_sizes(
    source: SourceCheckpoint, moments: Sequence[Moments], threads: int, meter: Meter
) -> Iterator[StepSize | None]:
    """The steps of these parameters, in order."""
    pairs = [tuple(source.items[source.tensors[name].index] for name in (m.exp_avg, m.exp_avg_sq)) for m in moments]
    sums = _in_pieces(source, pairs, lambda k, pair: update_size(pair[0], pair[1], moments[k]), threads, meter)
    for of, pieces in zip(moments, sums, strict=True):
        yield StepSize.of(pieces, of)


def root_mean_squares(
    source: SourceCheckpoint, items: Sequence[SourceItem], threads: int, meter: Meter
) -> Iterator[float]:
    """The rms of all finite values of these tensors, in order."""
    sums = _in_pieces(source, [(item,) for item in items], lambda _, values: _size(values[0]), threads, meter)
    for item, pieces in zip(items, sums, strict=True):
        yield _rms(sum(piece.sum_sq for piece in pieces), item.numel)


def _in_pieces(
    source: SourceCheckpoint,
    groups: Sequence[tuple[SourceItem, ...]],
    measure: Callable[[int, list[Tensor]], T],
    threads: int,
    meter: Meter,
) -> Iterator[list[T]]:
    """What `measure` finds in the pieces of every group of tensors of one shape, group by group.

    Pieces are measured on several threads, which so share large tensors; `measure` is told the number of the group.
    """

    def measured(piece: tuple[int, Chunk]) -> tuple[int, Chunk, T]:
        group, chunk = piece
        values = [source.chunk(item, chunk, _scratch, str(k)) for k, item in enumerate(groups[group])]
        return group, chunk, measure(group, values)

    firsts = ((number, group[0]) for number, group in enumerate(groups))
    pieces = ((number, chunk) for number, item in firsts for chunk in _flat_pieces(item.numel))
    found = list[T]()
    with ordered_map(measured, pieces, threads) as results:
        for number, chunk, result in results:
            found.append(result)
            meter.add((chunk.stop - chunk.start) * sum(item.dtype.itemsize for item in groups[number]))
            if chunk.stop == groups[number][0].numel:
                yield found
                found = []


def _flat_pieces(numel: int) -> Iterator[Chunk]:
    for start in range(0, max(numel, 1), _PIECE):
        stop = min(start + _PIECE, numel)
        yield Chunk(start, stop, (stop - start,))


def sampled_size(source: SourceCheckpoint, item: SourceItem, pieces: int) -> tuple[float, float]:
    """The rms and the largest magnitude of the finite values in so many pieces of a tensor, evenly spread."""
    starts, numel = [0], item.numel
    if item.numel > pieces * _SMALL:
        starts, numel = [(item.numel - _SMALL) * i // (pieces - 1) for i in range(pieces)], _SMALL
    values = source.sample(item, starts, numel, _scratch)
    sums = _size(values)
    return _rms(sums.sum_sq, values.numel()), sums.largest


def _size(values: Tensor) -> Size:
    return kernels.host().size(as_fp32(values.reshape(-1)))


def _rms(sum_sq: float, numel: int) -> float:
    return math.sqrt(sum_sq / numel) if numel else 0.0


def quantised_step(source: SourceCheckpoint, moments: QuantisedMoments) -> StepSize | None:
    """The step of a weight whose moments another package keeps quantised; None where they do not fit or decode."""
    if source.tensors[moments.weight].shape != moments.exp_avg.shape:
        return None
    try:
        return StepSize.of((update_size(m, v, moments) for m, v in quantised_moments(source, moments)), moments)
    except MalformedCheckpoint:  # it is kept all the same
        return None


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
    return kernels.host().update_size(as_fp32(m), as_fp32(v), eps=stored_eps(moments))


def momentum_update(single: Momentum, rms: float) -> float:
    """The rms of the update that a momentum of that rms makes: times the learning rate it is a step of its weight."""
    return rms if single.update is None else single.update


def largest_rate(trained: Iterable[AdamSettings | Momentum]) -> float:
    """The largest learning rate that is known; 0 if none is."""
    return max((rate(m.lr, 0.0) for m in trained), default=0.0)


def rate(lr: float | None, largest: float) -> float:
    """A learning rate; the file's largest where it is 0 or not known."""
    return lr if lr is not None and lr > 0 else largest


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
