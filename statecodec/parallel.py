"""Work in order on several threads, with a bounded number of pieces in flight.

Everything heavy (numba kernels, zstd, hashing, file reads) releases the GIL, so plain threads are enough.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def default_threads() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def ordered_map(function: Callable[[T], R], work: Iterable[T], threads: int) -> Iterator[Iterator[R]]:
    """Results of `function` over `work`, in order, computed on `threads` threads, two pieces in flight for each.

        with ordered_map(function, work, threads) as results:
            for result in results: ...

    The first exception stops the rest. When the block ends, however it does, nothing is running any more: what
    `function` works on may be closed.
    """
    with closing(_results(function, work, threads)) as results:
        yield results


def _results(function: Callable[[T], R], work: Iterable[T], threads: int) -> Generator[R, None, None]:
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
