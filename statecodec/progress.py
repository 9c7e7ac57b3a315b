"""Tells a callback how far a verb is: bytes done, bytes in all."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""(bytes done, bytes in all, what is being done)"""


class Meter:
    """Counts bytes for a progress callback; calls it at most once per `step` bytes, always at the end."""

    def __init__(self, progress: Progress | None, total: int, stage: str) -> None:
        self.progress, self.total, self.stage = progress, total, stage
        self.done, self._told = 0, -1
        self._step = max(total // 1000, 1 << 20)
        self._tell()

    def add(self, nbytes: int) -> None:
        """`nbytes` more are done."""
        self.done += nbytes
        if self.done - self._told >= self._step or self.done >= self.total:
            self._tell()

    def _tell(self) -> None:
        self._told = self.done
        if self.progress is not None:
            self.progress(self.done, self.total, self.stage)
