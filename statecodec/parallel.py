"""Work in order on several threads, with a bounded number of pieces in flight.

Everything heavy (numba kernels, zstd, hashing, file reads) releases the GIL, so plain threads are enough.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

_NOBODY = 0  # the identity of no thread
_IN_FLIGHT = 4  # pieces for each thread: some are so small that two are done while another thread works on one
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
        """With one thread, or before the block has begun, no other thread is there."""
        self.threads = threads
        self._waiting: SimpleQueue[_Piece | None] = SimpleQueue()
        self._others: list[threading.Thread] = []

    def results(self, function: Callable[[T], R], work: Iterable[T]) -> Generator[R, None, None]:
        """See `ordered_map`; closing the generator waits for what is running."""
        if not self._others:
            yield from map(function, work)
            return
        window: deque[_Piece] = deque()
        try:
            for argument in work:
                window.append(_Piece(function, argument))
                self._waiting.put(window[-1])
                if len(window) >= _IN_FLIGHT * self.threads:
                    yield self._oldest(window)
            while window:
                yield self._oldest(window)
        finally:
            for piece in window:
                if piece.owner(_NOBODY) not in (_NOBODY, threading.get_ident()):
                    piece.wait()

    def _oldest(self, window: deque[_Piece]) -> Any:
        """The result of the oldest piece. Until it is there, this thread works on what no other has begun."""
        with suppress(Empty):
            while not window[0].done:
                piece = self._waiting.get_nowait()
                if piece is not None:
                    piece.run()
        return window.popleft().result()

    def _serve(self) -> None:
        while (piece := self._waiting.get()) is not None:
            piece.run()
            del piece  # nothing of it lives on while this thread waits

    def __enter__(self) -> Workers:
        try:
            for number in range(1, self.threads):
                thread = threading.Thread(target=self._serve, name=f"statecodec_{number}")
                thread.start()
                self._others.append(thread)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for _other in self._others:
            self._waiting.put(None)
        while self._others:
            self._others.pop().join()


class _Piece:
    """A function and its argument, called once, on whatever thread. Lighter than a Future of the standard library."""

    __slots__ = ("_call", "_done", "_error", "_owner", "_value", "done")

    def __init__(self, function: Callable[[Any], Any], argument: Any) -> None:
        self._call = function, argument
        self._owner: dict[str, int] = {}
        self._value: Any = None
        self._error: BaseException | None = None
        self.done = False
        self._done = threading.Lock()
        self._done.acquire()

    def owner(self, thread: int) -> int:
        """Which thread runs it: the first that asks. Nobody does once nobody has asked.

        One call in C, so that an interrupt leaves no piece that others wait for in vain.
        """
        return self._owner.setdefault("thread", thread)

    def run(self) -> None:
        """Call it, unless it is another thread's. What it raises is raised where its result is asked for."""
        me = threading.get_ident()
        if self.owner(me) != me:
            return
        function, argument = self._call
        try:
            self._value = function(argument)
        except BaseException as error:
            self._error = error
        self.done = True
        self._done.release()

    def wait(self) -> None:
        """Wait until it has run."""
        with self._done:
            pass

    def result(self) -> Any:
        """What it returned, once it has run; raises what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value


@contextmanager
def ordered_map(function: Callable[[T], R], work: Iterable[T], threads: int | Workers) -> Iterator[Iterator[R]]:
    """Results of `function` over `work`, in order, computed on so many threads, four pieces in flight for each.

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
