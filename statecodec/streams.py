"""Work in order on several threads, with a bounded number of pieces in flight; progress.

Everything heavy (numba kernels, zstd, hashing, file reads) releases the GIL, so plain threads are enough.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from statecodec.codecs import PartSpec

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int, str], None]
_SCRATCH_LIMIT = 16 << 20


def default_threads() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[T], R], work: Iterable[T], threads: int) -> Generator[R, None, None]:
    """Results of `function` over `work`, in order, computed on `threads` threads, two pieces in flight for each.

    The first exception stops the rest; so does closing the generator, which waits for the pieces in flight. Close it
    (contextlib.closing) before what `function` works on: an exception in the caller's loop alone does not.
    """
    if threads <= 1:
        yield from map(function, work)
        return
    window: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="statecodec") as pool:
        try:
            for piece in work:
                window.append(pool.submit(function, piece))
                if len(window) >= 2 * threads:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            for future in window:
                future.cancel()


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


class Scratch(threading.local):
    """Buffers that a thread uses again for every chunk: fresh memory costs more in page faults than filling it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, role: str, spec: PartSpec) -> Tensor:
        """A tensor with arbitrary contents; valid until this thread takes the same role again."""
        held = self._buffers.get(role)
        if held is None or held.numel() < spec.nbytes:
            held = torch.empty(max(spec.nbytes, 1), dtype=torch.uint8, device="cpu")
            if spec.nbytes <= _SCRATCH_LIMIT:
                self._buffers[role] = held
        return held[: spec.nbytes].view(spec.dtype).view(spec.shape)


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))
