"""The loop that `compress`, `convert` and `save` share: encode all items of an output, and append them in order.

Chunks are made on several threads. A tensor whose values its codec cannot represent is stored by another codec, exactly
unless the caller knows better. Everything else stays as it was written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from statecodec import codecs
from statecodec.codecs import Codec, Encoding
from statecodec.codecs.chunking import Chunk, iterate
from statecodec.errors import UnencodableValues
from statecodec.format import ItemSpec, PackedChunk, Packing, VerifiedRecord, Writer
from statecodec.format.placement import plain_items
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison
from statecodec.parallel import Workers, default_threads, ordered_map
from statecodec.progress import Meter, Progress

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EncodedChunk:
    """One chunk's parts, and how their decoded values compare with what they were made of (None: equal).

    `record` is the chunk as it was packed before, in place of `parts`.
    """

    parts: Mapping[str, Tensor]
    comparison: Comparison | None = None
    record: VerifiedRecord | None = None


class Encoder(Protocol):
    """Makes a chunk of an item, by index, in an encoding. Thread-safe. Raises UnencodableValues."""

    def __call__(self, index: int, encoding: Encoding, chunk: Chunk) -> EncodedChunk: ...


@dataclass(frozen=True)
class WriteOptions:
    """Where and how to write."""

    target: Path
    packing: Packing
    max_shard_size: int | None = None
    force: bool = False
    threads: int = field(default_factory=default_threads)
    progress: Progress | None = None


Fallback = Callable[[int], Codec]  # item -> the codec that takes what the chosen one refuses
Figures = Callable[[int, Comparison], dict[str, float]]  # item, its error sums -> the figures to be stored
Finer = Callable[[int, Codec, Comparison], Codec | None]  # the same, its codec -> the codec to try next


def exactly(_: int) -> Codec:
    """Whatever a codec refuses is stored as it is."""
    return codecs.Raw()


@dataclass(frozen=True)
class ErrorRules:
    """What is done with the sums of an item's errors."""

    figures: Figures
    finer: Finer = lambda index, codec, sums: None


@contextmanager
def appended(
    output: WriteOptions,
    items: Sequence[ItemSpec],
    encode: Encoder,
    stage: str,
    *,
    fallback: Fallback = exactly,
    errors: ErrorRules | None = None,
) -> Iterator[tuple[Writer, Mapping[str, str]]]:
    """A writer to which all items have been appended, to be finished inside the `with`, and the refusals."""
    run = _Run(output, items, encode, stage, fallback, errors or ErrorRules(lambda index, sums: {}))
    with run.written() as writer:
        error_of: dict[str, dict[str, float]] = {}
        for index, sums in run.sums.items():
            figures = run.errors.figures(index, sums)
            # Sums may overflow; their last digits depend on the order of additions.
            error = {name: float(f"{x:.7g}") for name, x in figures.items() if math.isfinite(x)}
            error_of[run.items[index].name] = error
            writer.set_attributes(index, {**run.items[index].attributes, "error": error})
        for index, original in run.repeated():
            if original in error_of:
                writer.set_attributes(index, {**run.items[index].attributes, "error": error_of[original]})
        yield writer, run.refusals


@dataclass(frozen=True)
class _Job:
    index: int
    chunk: Chunk


class _Refused(Exception):
    """Raised where an item's values are refused, perhaps by work ahead of its turn, which then counts for nothing."""

    def __init__(self, index: int, why: str) -> None:
        super().__init__(why)
        self.index, self.why = index, why


class _Restart(Exception):
    """Raised to store an item in another way: its values were refused (and why), or its error was too large."""

    def __init__(self, index: int, encoding: Encoding, refusal: str | None = None) -> None:
        super().__init__(refusal)
        self.index, self.encoding, self.refusal = index, encoding, refusal


class _Run:
    """One output in the making."""

    def __init__(
        self,
        output: WriteOptions,
        items: Sequence[ItemSpec],
        encode: Encoder,
        stage: str,
        fallback: Fallback,
        errors: ErrorRules,
    ) -> None:
        self.items, self.encode, self.fallback, self.output = list(items), encode, fallback, output
        self.errors = errors
        self.refusals: dict[str, str] = {}
        self.sums: dict[int, Comparison] = {}
        self.meter = Meter(output.progress, sum(map(_nbytes, items)), stage)
        self._settle_plain(output.packing)

    @contextmanager
    def written(self) -> Iterator[Writer]:
        """A writer with all items appended."""
        output = self.output
        while True:
            with Writer(
                output.target,
                self.items,
                packing=output.packing,
                max_shard_size=output.max_shard_size,
                force=output.force,
            ) as writer:
                with Workers(output.threads) as workers:
                    whole = self._append_all(writer, workers)
                if whole:
                    yield writer
                    return

    def repeated(self) -> Iterator[tuple[int, str]]:
        """The items that repeat others, whose errors they share, and the names of those others."""
        for index, item in enumerate(self.items):
            if item.encoding.codec.repeats:
                yield index, item.companions["original"]

    def _append_all(self, writer: Writer, workers: Workers) -> bool:
        """Append every item; one that gets another codec starts again.

        False if everything has to start again, because others were encoded beside values that have changed since.
        """
        restart = self._append_from(writer, 0, workers)
        while restart is not None:
            self._recode(restart, self.items[restart.index].recoded(restart.encoding))
            if self._encoded_beside(restart.index):
                self.sums.clear()
                self.meter.add(-sum(map(_nbytes, self.items[: restart.index])))
                return False
            writer.restart(restart.index, restart.encoding)
            restart = self._append_from(writer, restart.index, workers)
        return True

    def _encoded_beside(self, index: int) -> bool:
        """Whether the parts of other items depend on how this one is stored."""
        name = self.items[index].name
        return any(item.encoding.codec.needs_decoded and name in item.companions.values() for item in self.items)

    def _settle_plain(self, packing: Packing) -> None:
        """Try plain parts first: their places are fixed before the first byte is written."""
        for index in plain_items(self.items, packing):
            while (restart := self._tried(index)) is not None:
                self._recode(restart, replace(self.items[index], encoding=restart.encoding))
            self.sums.pop(index, None)

    def _tried(self, index: int) -> _Restart | None:
        item = self.items[index]
        if item.encoding.exact and not item.encoding.codec.needs:
            return None
        try:
            for chunk in iterate(item.encoding.codec, item.shape, item.dtype):
                job = _Job(index, chunk)
                self._add(job, self._encoded(job).comparison)
        except _Refused as refused:
            return self._instead(refused)
        except _Restart as restart:
            return restart
        return None

    def _instead(self, refused: _Refused) -> _Restart:
        return _Restart(refused.index, Encoding(self.fallback(refused.index)), refused.why)

    def _encoded(self, job: _Job) -> EncodedChunk:
        try:
            return self.encode(job.index, self.items[job.index].encoding, job.chunk)
        except UnencodableValues as error:
            raise _Refused(job.index, str(error)) from error

    def _add(self, job: _Job, comparison: Comparison | None) -> None:
        """Count a chunk's errors. Raises _Restart after the last if they are too large."""
        if comparison is None:
            return
        item, sums = self.items[job.index], self.sums.get(job.index, NO_DIFFERENCE).merged(comparison)
        self.sums[job.index] = sums
        if job.chunk.stop == math.prod(item.shape):
            finer = self.errors.finer(job.index, item.encoding.codec, sums)
            if finer is not None:
                raise _Restart(job.index, Encoding(finer, item.encoding.change))

    def _recode(self, restart: _Restart, item: ItemSpec) -> None:
        if restart.refusal is not None:
            self.refusals[item.name] = restart.refusal
        self.items[restart.index] = item
        self.sums.pop(restart.index, None)

    def _append_from(self, writer: Writer, start: int, workers: Workers) -> _Restart | None:
        """Append the items from `start` on, up to one that has to get another codec, if any."""

        def make(job: _Job) -> tuple[_Job, PackedChunk, Comparison | None]:
            encoded = self._encoded(job)
            if encoded.record is not None:
                return job, writer.repacked(job.index, job.chunk, encoded.record), encoded.comparison
            return job, writer.pack(job.index, job.chunk, encoded.parts), encoded.comparison

        done = {start: 0}
        try:
            with ordered_map(make, self._jobs(start), workers) as packed_chunks:
                for job, packed, comparison in packed_chunks:
                    self._add(job, comparison)
                    writer.append(packed)
                    nbytes = (job.chunk.stop - job.chunk.start) * self.items[job.index].dtype.itemsize
                    done = {job.index: done.get(job.index, 0) + nbytes}
                    self.meter.add(nbytes)
        except (_Refused, _Restart) as stopped:
            self.meter.add(-done.get(stopped.index, 0))
            return self._instead(stopped) if isinstance(stopped, _Refused) else stopped
        return None

    def _jobs(self, start: int) -> Iterator[_Job]:
        for index in range(start, len(self.items)):
            item = self.items[index]
            for chunk in iterate(item.encoding.codec, item.shape, item.dtype):
                yield _Job(index, chunk)


def _nbytes(item: ItemSpec) -> int:
    return math.prod(item.shape) * item.dtype.itemsize
