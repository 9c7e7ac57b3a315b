"""Work in order on several threads, with a bounded number of pieces in flight.

Everything heavy (numba kernels, zstd, hashing, file reads) releases the GIL, so plain threads are enough.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def default_threads() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Threads that serve one `ordered_map` after the other, so that their scratch memory is allocated once.

    A context manager; the threads end with the block.
    """

    def __init__(self, threads: int) -> None:
        """With one thread no thread is started: the caller does the work when it asks for results."""
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="statecodec") if threads > 1 else None

    def results(self, function: Callable[[T], R], work: Iterable[T]) -> Generator[R, None, None]:
        """See `ordered_map`; closing the generator waits for what is running."""
        if self._pool is None:
            yield from map(function, work)
            return
        window: deque[Future[R]] = deque()
        try:
            for piece in work:
                window.append(self._pool.submit(function, piece))
                if len(window) >= 2 * self.threads:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            wait([future for future in window if not future.cancel()])

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()


@contextmanager
def ordered_map(function: Callable[[T], R], work: Iterable[T], threads: int | Workers) -> Iterator[Iterator[R]]:
    """Results of `function` over `work`, in order, computed on so many threads, two pieces in flight for each.

        with ordered_map(function, work, threads) as results:
            for result in results: ...

    The first exception stops the rest. When the block ends, however it does, nothing is running any more: what
    `function` works on may be closed.
    """
    with (
        Workers(threads) if isinstance(threads, int) else nullcontext(threads) as workers,
        closing(workers.results(function, work)) as results,
    ):
        yield results
