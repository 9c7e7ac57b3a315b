"""Work in order on several threads, with a bounded number of pieces in flight; reading, hashing and progress.

Everything heavy (numba kernels, zstd, hashing, file reads) releases the GIL, so plain threads are enough.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from statecodec.errors import MalformedCheckpoint

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int, str], None]
_BLOCK = 4 << 20


def default_threads() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[T], R], work: Iterable[T], threads: int) -> Iterator[R]:
    """Results of `function` over `work`, in order, computed on `threads` threads, two pieces in flight for each.

    The first exception stops the rest; so does closing the iterator.
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


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def read_exactly(fd: int, offset: int, target: memoryview, name: str) -> None:
    """Fill `target` (bytes) from a file. Raises MalformedCheckpoint if the file is shorter."""
    got = 0
    while got < len(target):
        count = os.preadv(fd, [target[got:]], offset + got)
        if count == 0:
            raise MalformedCheckpoint(f"{name}: ends at byte {offset + got}; the file shrank while it was read")
        got += count


def write_exactly(fd: int, offset: int, data: memoryview) -> None:
    """Write all of `data` at an offset."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


class FileHashes(threading.Thread):
    """SHA-256 of files, one after the other, on a thread that never holds more than one block.

    It reads the files again rather than following the conversion: the pages are in the cache, and the two stay
    independent. A file that is still being written is followed up to where `advance` says it is complete.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], *, growing: bool = False) -> None:
        """`files`: (path, bytes). With `growing`, nothing is read before `advance` allows it (one file only)."""
        super().__init__(name="statecodec-sha256", daemon=True)
        self.files = files
        self._digests: list[str] = []
        self._error: BaseException | None = None
        self._stopped = False
        self._readable = 0 if growing else sum(nbytes for _, nbytes in files)
        self._changed = threading.Condition()

    def run(self) -> None:
        try:
            for path, nbytes in self.files:
                self._digests.append(self._hash(path, nbytes))
        except BaseException as error:  # handed to whoever asks for the digests
            self._error = error

    def advance(self, nbytes: int) -> None:
        """The first `nbytes` bytes of the (growing) file will not change any more."""
        with self._changed:
            self._readable = max(self._readable, nbytes)
            self._changed.notify()

    def cancel(self) -> None:
        """Stop at the next block; `digests` must not be asked for any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def digests(self) -> list[str]:
        """Hex SHA-256 of each file, once the thread is done; raises what it met."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._digests

    def _wait_until(self, readable: int) -> bool:
        """Block until so many bytes may be read; False if the work is off."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._readable >= readable)
        return not self._stopped

    def _hash(self, path: Path, nbytes: int) -> str:
        sha, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset in range(0, nbytes, _BLOCK):
                piece = block[: min(_BLOCK, nbytes - offset)]
                if not self._wait_until(offset + len(piece)):
                    break
                read_exactly(fd, offset, piece, str(path))
                sha.update(piece)
        finally:
            os.close(fd)
        return sha.hexdigest()
