"""`inspect`: what is in a checkpoint, compressed or not, without running anything in it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.pickles import pickles, safe_pickles
from statecodec.checkpoint.report import Report


def inspect(src: str | Path, *, safe_only: bool = False) -> Report:
    """Say what is in a checkpoint, compressed or not: tensors with roles, shapes, codecs and bytes.

    Reads headers and pickles only. Of an uncompressed checkpoint every codec is `raw`, and `source.sha256` is None
    because all of it would have to be read.

    Args:
        src: The checkpoint.
        safe_only: Refuse a checkpoint whose unpickling could run code.

    Returns:
        The report. Its `pickles` say what unpickling the files would import, and what of that can run code.

    Raises:
        FormatError: If a compressed checkpoint cannot be read.
        LayoutError: If an uncompressed one cannot.
        UnsafeCheckpoint: With `safe_only`, if unpickling it could run code.

    Example:
        >>> import tempfile, torch, statecodec
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": {"w": torch.ones(8, 4)}}, f"{folder}/ckpt.pt")
        ...     report = statecodec.inspect(f"{folder}/ckpt.pt")
        >>> [(tensor.name, tensor.shape, tensor.codec) for tensor in report.tensors if tensor.role != "skeleton"]
        [('model.w', (8, 4), 'raw')]
    """
    started = time.perf_counter()
    with open_checkpoint(src) as checkpoint:
        in_pickles = safe_pickles(checkpoint) if safe_only else pickles(checkpoint)
        seconds = time.perf_counter() - started
        return replace(checkpoint.report(), path=str(src), pickles=in_pickles, seconds=seconds)
