"""What is in a checkpoint, compressed or not, without running anything in it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.report import Report


def inspect(src: str | Path) -> Report:
    """The tensors of a checkpoint with their roles, shapes, codecs and bytes; reads headers only.

    Of an uncompressed checkpoint every codec is `raw` and `source.sha256` is None, as that would need all of it read.
    Raises FormatError or LayoutError.
    """
    started = time.perf_counter()
    with open_checkpoint(src) as checkpoint:
        return replace(checkpoint.report(), path=str(src), seconds=time.perf_counter() - started)
