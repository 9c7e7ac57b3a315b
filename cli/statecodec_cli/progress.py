"""Progress on standard error: a bar where there is a terminal, a line every few seconds where there is none."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from statecodec_cli import console

Callback = Callable[[int, int, str], None]  # done bytes, total bytes, stage

_LINE_EVERY = 10.0  # seconds between lines where standard error is not a terminal
_log = logging.getLogger("statecodec")  # the library's own: what it does that takes a while


@contextmanager
def reporting(*, quiet: bool) -> Iterator[Callback | None]:
    """Yield the callback to hand to the library, or None when nothing is to be shown."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as (callback, say), messages(say):
            yield callback
    else:
        with messages(console.say):
            yield Lines(console.say)


@contextmanager
def messages(say: Callable[[str], None]) -> Iterator[None]:
    """Say what the library logs meanwhile, such as that it compiles."""
    handler, before = _Handler(say), _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(before)


class _Handler(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Say one message."""
        self._say(record.getMessage())


@contextmanager
def _bar() -> Iterator[tuple[Callback, Callable[[str], None]]]:
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

        def say(message: str) -> None:
            progress.console.print(console.printable(message), markup=False, style="dim")

        yield callback, say


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
