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

    A context manager; the threads end with the block. The thread that asks for results is one of them: instead of
    waiting it works, because waking a thread up costs as much as a small piece of work.
    """

    def __init__(self, threads: int) -> None:
        """With one thread no thread is started."""
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="statecodec") if threads > 1 else None

    def results(self, function: Callable[[T], R], work: Iterable[T]) -> Generator[R, None, None]:
        """See `ordered_map`; closing the generator waits for what is running."""
        if self._pool is None:
            yield from map(function, work)
            return
        window: deque[tuple[T, Future[R]]] = deque()
        try:
            for piece in work:
                window.append((piece, self._pool.submit(function, piece)))
                if len(window) >= 2 * self.threads:
                    yield _oldest(function, window)
            while window:
                yield _oldest(function, window)
        finally:
            wait([future for _, future in window if not future.cancel()])

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


def _oldest(function: Callable[[T], R], window: deque[tuple[T, Future[R]]]) -> R:
    """The result of the oldest piece. Until it is there, this thread works on what no other has begun."""
    while not window[0][1].done():
        taken = next((k for k, (_, future) in enumerate(window) if future.cancel()), None)
        if taken is None:
            break
        piece, done = window[taken][0], Future[R]()
        try:
            done.set_result(function(piece))
        except Exception as error:  # it is raised when it is the piece's turn
            done.set_exception(error)
        window[taken] = piece, done
    return window.popleft()[1].result()
