"""Progress on standard error: a bar where there is a terminal, a line every few seconds where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from statecodec_cli import console

Callback = Callable[[int, int, str], None]  # done bytes, total bytes, stage

_LINE_EVERY = 5.0  # seconds between lines where standard error is not a terminal


@contextmanager
def reporting(*, quiet: bool) -> Iterator[Callback | None]:
    """Yield the callback to hand to the library, or None when nothing is to be shown."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as callback:
            yield callback
    else:
        yield Lines(console.say)


@contextmanager
def _bar() -> Iterator[Callback]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=32),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console.stderr(), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def callback(done: int, total: int, stage: str) -> None:
            if stage not in tasks:
                for finished in tasks.values():
                    progress.update(finished, visible=False)
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield callback


class Lines:
    """Calls `write` with one line of progress every few seconds; work shorter than that stays silent."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._stage = ""
        self._started = self._last = clock()
        self._skipped = 0

    def __call__(self, done: int, total: int, stage: str) -> None:
        now = self._clock()
        if stage != self._stage:
            self._stage, self._started, self._skipped = stage, now, done
        if now - self._last < _LINE_EVERY or done == total:
            return
        self._last = now
        elapsed = now - self._started
        rate = (done - self._skipped) / elapsed if elapsed > 0 else 0.0
        line = f"{stage}: {100 * done / total:.0f}% of {console.size(total)}" if total else stage
        if rate > 0:
            line += f", {console.size(rate)}/s, {console.seconds((total - done) / rate)} left"
        self._write(line)
