"""Joins the shares of a compression to the file that a single process would have written, byte for byte."""

from __future__ import annotations

import contextlib
import re
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from statecodec.checkpoint.chain import BaseCheckpoint
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.choose.choices import Choice, Choices, by_rules
from statecodec.choose.shortfalls import Kept
from statecodec.choose.since_base import standing_alone
from statecodec.codecs import Encoding
from statecodec.codecs.chunking import Chunk
from statecodec.errors import CodecError, CorruptFile, UsageError
from statecodec.format import ItemSpec, Reader
from statecodec.parallel import default_threads
from statecodec.progress import Progress
from statecodec.verbs.appending import EncodedChunk
from statecodec.verbs.compress import open_source, output_of
from statecodec.verbs.compression import Compression, verification_of
from statecodec.verbs.processors import Cpu
from statecodec.verbs.settings import CompressSettings
from statecodec.verbs.shares import MAX_SHARES, Share, header_of
from statecodec.verbs.step_errors import StepErrors
from statecodec.verbs.writing import write

_SHOWN = 8


def finalize(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    verify: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Join the shares that `compress_share` made, and remove them.

    All shares must be there, made of the source as it is now and with equal settings. The file gets its name once it is
    whole and on the disk; the shares are removed after that.

    Args:
        src: The source of the shares.
        dst: Where the compressed file goes, as it was told to `compress_share`; the shares lie beside it.
        verify: Read the result back and compare it with the source before it gets its name.
        force: Replace a file that is there.
        threads: Number of threads; by default the CPUs that this process may use.
        progress: Called with (bytes done, bytes in all, what is being done).

    Returns:
        The report of the compressed file.

    Raises:
        UsageError: If shares are missing, or were made with different settings.
        CorruptFile: If a share is damaged.
        LayoutError: If the source cannot be read as a checkpoint.
        OutputExists: If `dst` is there, without `force`.
        OutputFailed: If `dst` cannot be written.
        VerificationFailed: If `verify` finds a difference.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as closing:
        source = closing.enter_context(open_source(src))
        target = output_of(source, dst, force=force)
        shares = [closing.enter_context(Reader(path)) for path in _paths(target)]
        settings, base = _agreed(shares, source, target)
        previous = closing.enter_context(contextlib.closing(BaseCheckpoint(base, target))) if base is not None else None
        joined = _Joined(source, shares)
        choices = by_rules(source, settings.caller_policy, settings.preset, strict=settings.strict)
        choices = standing_alone(joined.choices(choices), previous)
        work = Compression(source, choices, previous if choices.uses_base else None, Cpu(), settings, joined.totals)
        output = settings.output(target, force, threads or default_threads(), progress)
        verification = verification_of(source, output) if verify else None

        def document(_: Mapping[str, str]) -> dict[str, Any]:
            source.files.check_unchanged()
            return work.document(joined.digests, joined.refusals)

        outcome = write(output, joined.items(work), joined.encode, document, "joining", verification=verification)
        report = outcome.report(output)
    for share in shares:
        share.path.unlink()
    total = {**(joined.totals.figures() or {}), **(report.total or {})} or None
    return replace(report, unmet=choices.unmet, total=total, seconds=time.perf_counter() - started)


def _paths(target: Path) -> list[Path]:
    """The files of all shares of an output, in order. Raises UsageError."""
    pattern = re.compile(re.escape(target.name) + r"\.share-([0-9]{1,4})-of-([0-9]{1,4})")
    numbers: dict[int, set[int]] = {}
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match:
            numbers.setdefault(int(match[2]), set()).add(int(match[1]))
    if not numbers:
        raise UsageError(f"there are no shares of {target}: `compress --shard I/N` makes them")
    if len(numbers) > 1:
        counts = ", ".join(map(str, sorted(numbers)))
        raise UsageError(f"shares of several divisions of {target} lie here (of {counts}): remove those of the others")
    ((count, there),) = numbers.items()
    if not 1 <= count <= MAX_SHARES:
        raise UsageError(f"shares of {count}: at most {MAX_SHARES} can be joined")
    missing = sorted(set(range(1, count + 1)) - there)
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        shown = ", ".join(map(str, missing[:_SHOWN]))
        raise UsageError(f"{len(missing)} of {count} shares of {target} are missing: {shown}{more}")
    return [Share(i, count).path(target) for i in range(1, count + 1)]


def _agreed(shares: Sequence[Reader], source: SourceCheckpoint, target: Path) -> tuple[CompressSettings, Path | None]:
    """The settings that all shares were made with, and the base if there is one. Raises UsageError, CorruptFile."""
    first = shares[0].document.get("share")
    try:
        settings = CompressSettings.from_json(first["settings"])  # type: ignore[index]
        base = target.with_name(first["base"]) if first["base"] is not None else None  # type: ignore[index]
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{shares[0].path.name} is no share of a compression") from error
    with contextlib.ExitStack() as closing:
        previous = closing.enter_context(contextlib.closing(BaseCheckpoint(base, target))) if base is not None else None
        for number, share in enumerate(shares, 1):
            expected, there = header_of(source, settings, previous, Share(number, len(shares))), share.document["share"]
            unequal = [key for key in expected if not isinstance(there, dict) or there.get(key) != expected[key]]
            if unequal:
                raise UsageError(
                    f"{share.path.name} was made of another source or with other settings than {source.path} and the "
                    f"first share now ({', '.join(unequal)} differ): make it again"
                )
    return settings, base


@dataclass(frozen=True)
class _Place:
    share: Reader
    index: int


class _Joined:
    """What the shares hold, by item of the source."""

    def __init__(self, source: SourceCheckpoint, shares: Sequence[Reader]) -> None:
        places = {item.name: _Place(share, i) for share in shares for i, item in enumerate(share.items)}
        if set(places) != {item.name for item in source.items}:
            raise CorruptFile(f"the shares of {source.path} do not hold its tensors: make them again")
        self.source = source
        self._places = [places[item.name] for item in source.items]
        self.totals = StepErrors()
        try:
            self.refusals = _in_order(source, shares)
            self.announced = {
                name: Encoding.from_config(config)
                for share in shares
                for name, config in share.document["announced"].items()
            }
            index = {item.name: item.index for item in source.items}
            self.kept = Kept.joined([share.document["kept"] for share in shares], index)
            self.digests = {int(k): str(v) for share in shares for k, v in share.document["digests"].items()}
            for share in shares:
                for name, (error, size) in share.document["sums"].items():
                    self.totals.add(name, float(error), float(size))
        except (KeyError, TypeError, ValueError, AttributeError, CodecError) as error:
            raise CorruptFile(f"the shares of {source.path} are damaged: make them again") from error

    def choices(self, choices: Choices) -> Choices:
        """The same choices with the codecs that the shares have, and what these kept of the promise."""
        by_name = dict(choices.by_name)
        for item, place in zip(self.source.items, self._places, strict=True):
            stored = place.share.items[place.index]
            by_name[item.name] = Choice(stored.encoding, "as its share has it", companions=stored.companions)
        return replace(choices, by_name=by_name, kept=self.kept)

    def items(self, work: Compression) -> list[ItemSpec]:
        """What will be written, with the attributes that the shares have."""
        return [
            replace(
                item,
                attributes=dict(place.share.items[place.index].attributes),
                announced=self.announced.get(item.name),
            )
            for item, place in zip(map(work.item, range(len(self._places))), self._places, strict=True)
        ]

    def encode(self, index: int, encoding: Encoding, chunk: Chunk) -> EncodedChunk:
        """A chunk as its share has it: packed, where it has a record of its own."""
        place = self._places[index]
        item = place.share.items[place.index]
        number = bisect_left(item.chunks, chunk.start, key=lambda stored: stored.start)
        if item.storage == "packed":
            return EncodedChunk({}, record=place.share.record(place.index, number))
        return EncodedChunk(place.share.read_chunk(place.index, number))


def _in_order(source: SourceCheckpoint, shares: Sequence[Reader]) -> dict[str, str]:
    """Why items are stored exactly, in the order of the items."""
    refusals: dict[str, str] = {}
    for share in shares:
        refusals.update(share.document["refusals"])
    return {item.name: refusals[item.name] for item in source.items if item.name in refusals}
