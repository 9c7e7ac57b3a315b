"""What is in a checkpoint, compressed or not, without running anything in it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.pickles import pickles, require_safe
from statecodec.checkpoint.report import PickleReport, Report
from statecodec.checkpoint.source import SourceCheckpoint


def inspect(src: str | Path, *, safe_only: bool = False) -> Report:
    """The tensors of a checkpoint with their roles, shapes, codecs and bytes; reads headers and pickles only.

    `pickles` says what unpickling the files would import, and what of that can run code; with `safe_only` a checkpoint
    with such a file is refused. Pickles inside of a compressed checkpoint have to be unpacked for that, so they are
    looked at with `safe_only` only. Of an uncompressed checkpoint every codec is `raw` and `source.sha256` is None, as
    that would need all of it read. Raises FormatError or LayoutError.
    """
    started = time.perf_counter()
    with open_checkpoint(src) as checkpoint:
        in_pickles: tuple[PickleReport, ...] = ()
        if safe_only:
            in_pickles = require_safe(checkpoint)
        elif isinstance(checkpoint, SourceCheckpoint):
            in_pickles = pickles(checkpoint)
        seconds = time.perf_counter() - started
        return replace(checkpoint.report(), path=str(src), pickles=in_pickles, seconds=seconds)
