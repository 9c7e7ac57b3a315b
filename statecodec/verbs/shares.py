"""A compression divided among processes or machines: each writes a share, and one of them joins the shares.

A share is a file beside the output, NAME.share-2-of-16, with its items encoded and packed. Which items these are
follows from the source and the number of shares alone, so shares need not know of each other, and a lost one can be
made again. The joined output has the same bytes as that of a single process.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statecodec._version import __version__
from statecodec.checkpoint.chain import BaseCheckpoint
from statecodec.checkpoint.pickles import safe_pickles
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.choose.copies import copies
from statecodec.choose.derived import followers
from statecodec.errors import FormatError, UsageError
from statecodec.format import Reader
from statecodec.parallel import default_threads
from statecodec.progress import Progress
from statecodec.verbs.appending import ErrorRules, WriteOptions, appended
from statecodec.verbs.compress import open_source, output_of
from statecodec.verbs.compression import Compression
from statecodec.verbs.processors import processor
from statecodec.verbs.settings import CompressSettings

MAX_SHARES = 4096


@dataclass(frozen=True)
class Share:
    """One of `count` shares; `number` counts from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """A share as people write it: `2/16` is the second of sixteen. Raises UsageError."""
        match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count <= MAX_SHARES:
            raise UsageError(f"share {text!r}: expected I/N with I from 1 to N, and N up to {MAX_SHARES}, such as 2/16")
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def path(self, target: Path) -> Path:
        """The file of this share of an output."""
        return target.with_name(f"{target.name}.share-{self.number}-of-{self.count}")


@dataclass(frozen=True)
class ShareReport:
    """What `compress_share` did.

    `made` is false if the share was there already, of the same source and settings.
    """

    path: str
    share: str
    items: int
    nbytes: int
    made: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": self.path, "share": self.share, "items": self.items, "bytes": self.nbytes, "made": self.made,
            "seconds": self.seconds,
        }  # fmt: skip


def compress_share(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    share: str | Share,
    base: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    safe_only: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> ShareReport:
    """Make one share of a compression; `finalize` joins the shares when all are there.

    A share that is there already is kept, if it was made of the same source with the same settings.

    Args:
        src: The checkpoint's path.
        dst: Where the compressed file will go; the share is written beside it.
        share: Which share this is: `2/16` is the second of sixteen.
        base: As for `compress`; the same for all shares.
        device: As for `compress`.
        force: Do not refuse a `dst` that is there; `finalize` must then be told to replace it.
        safe_only: Refuse a source whose unpickling could run code.
        threads: Number of threads; by default the CPUs that this process may use.
        progress: Called with (bytes done, bytes in all, what is being done).
        **settings: Settings of `compress` (preset, rules, max_step_error, pack ...); the same for all shares.

    Returns:
        Which share was made, with its file and size. `made` is false if it was there already.

    Raises:
        UsageError: For a text that is no share, or options that contradict each other.
        PolicyError: For a preset or a rule that cannot be read.
        CodecError: For a rule's codec that does not exist or has wrong fields.
        LayoutError: If the source cannot be read as a checkpoint, or is unsafe with `safe_only`.
        FormatError: If the base cannot be read.
        BackendUnavailable: For the device `cuda` without a card.
        OutputExists: If `dst` is there, without `force`.
        OutputFailed: If the share cannot be written.
    """
    started = time.perf_counter()
    chosen, which = CompressSettings.of(**settings), Share.parse(share) if isinstance(share, str) else share
    workers = threads or default_threads()
    with contextlib.ExitStack() as closing:
        source = closing.enter_context(open_source(src))
        target = output_of(source, dst, force=force)
        if safe_only:
            safe_pickles(source)
        previous = closing.enter_context(contextlib.closing(BaseCheckpoint(base, target))) if base is not None else None
        header = header_of(source, chosen, previous, which)
        path = which.path(target)
        there = _there(path, header)
        if there is not None:
            return ShareReport(str(path), str(which), there[0], there[1], False, time.perf_counter() - started)
        indices = deal(source, which.count)[which.number - 1]
        names = frozenset(source.items[i].name for i in indices)
        choices = chosen.choose(source, previous, workers, progress, names)
        where = processor(device, source.nbytes // which.count, workers)
        work = Compression(source, choices, previous, where, chosen)
        output = WriteOptions(path, chosen.packing, None, True, where.workers(workers), progress)
        written = _write(work, output, indices, which, header)
    return ShareReport(str(path), str(which), len(indices), written, True, time.perf_counter() - started)


def deal(source: SourceCheckpoint, count: int) -> list[list[int]]:
    """The indices of the items of every share, divided by size. Tensors that are decoded together stay together."""
    leader = list(range(len(source.items)))

    def lead(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    for indices in _together(source):
        first, *others = sorted(map(lead, indices))
        for index in others:
            leader[index] = first
    groups: dict[int, list[int]] = {}
    for index in range(len(leader)):
        groups.setdefault(lead(index), []).append(index)
    total = sum(item.nbytes for item in source.items)
    shares: list[list[int]] = [[] for _ in range(count)]
    done = 0
    for group in groups.values():
        nbytes = sum(source.items[i].nbytes for i in group)
        middle = done + nbytes // 2
        shares[min(middle * count // total, count - 1) if total else 0].extend(group)
        done += nbytes
    return [sorted(share) for share in shares]


def _together(source: SourceCheckpoint) -> Iterator[list[int]]:
    """The numbers of items that may be decoded from each other."""
    for moments in source.moments:
        yield [source.tensors[name].index for name in (moments.exp_avg, moments.exp_avg_sq)]
    for weight, masters in followers(source):
        yield [weight.index, *(master.index for master in masters)]
    for group in copies(source):
        yield [item.index for item in group]


def _write(
    work: Compression, output: WriteOptions, indices: Sequence[int], share: Share, header: Mapping[str, Any]
) -> int:
    """Write a share; returns its bytes."""
    work = work.checked(frozenset(indices))
    own = work.source.own_files if work.settings.stores_sha256 else []
    with work.hashing(own[share.number - 1 :: share.count]) as hashes:  # this share's part of it
        appending = appended(
            output,
            [work.item(i) for i in indices],
            lambda index, codec, chunk: work.encode(indices[index], codec, chunk),
            f"share {share}",
            fallback=lambda index: work.instead(indices[index]),
            errors=ErrorRules(
                lambda index, sums: work.figures(indices[index], sums),
                lambda index, codec, sums: work.finer(indices[index], codec, sums),
            ),
        )
        with appending as (writer, refusals):
            digests = {str(file): digest for file, digest in hashes().items()}
            work.finish_reading()
            announced = {item.name: item.announced.config() for item in writer.items if item.announced is not None}
            results = {
                "refusals": dict(refusals), "announced": announced, "sums": dict(work.totals.sums), "digests": digests,
                "kept": work.choices.kept.to_json(),
            }  # fmt: skip
            return writer.finish({"share": header, **results}).publish().nbytes


def header_of(
    source: SourceCheckpoint, settings: CompressSettings, base: BaseCheckpoint | None, share: Share
) -> dict[str, Any]:
    """What identifies a share. Shares can be joined if only their numbers differ."""
    return {
        "statecodec": __version__,
        "number": share.number,
        "count": share.count,
        "source": _fingerprint(source),
        "settings": settings.to_json(),
        "base": base.file.name if base is not None else None,
        "base_manifest": base.file.digest if base is not None else None,
    }


def _fingerprint(source: SourceCheckpoint) -> str:
    """A digest of the files' names, sizes and times of writing, which copies must keep."""
    digest = hashlib.sha256()
    for file in source.located.files:
        state = (file.path, file.nbytes, file.layout, file.identity.mtime_ns)
        digest.update(repr(state).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _there(path: Path, header: Mapping[str, Any]) -> tuple[int, int] | None:
    """Items and bytes of a whole share with that header, if it is there already."""
    if not path.exists():
        return None
    try:
        with Reader(path) as reader:
            return (len(reader.items), reader.nbytes) if reader.document.get("share") == header else None
    except FormatError:  # a damaged share is made again
        return None
