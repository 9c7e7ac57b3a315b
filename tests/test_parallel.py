"""Results come in order, errors stop the rest, and nothing runs when the block has ended."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from statecodec import parallel
from statecodec.parallel import Workers, ordered_map


class Work:
    """Counts the pieces that are being worked on."""

    def __init__(self) -> None:
        self.running, self.started, self._lock = 0, 0, threading.Lock()

    def __call__(self, piece: int) -> int:
        with self._lock:
            self.running += 1
            self.started += 1
        time.sleep(0.001)
        with self._lock:
            self.running -= 1
        if piece == 50:
            raise ValueError(piece)
        return piece


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_until_one_fails(threads: int) -> None:
    work, found = Work(), []
    with pytest.raises(ValueError, match="50"), ordered_map(work, range(1000), threads) as results:
        found.extend(results)
    assert found == list(range(50))
    assert work.running == 0
    assert work.started <= 50 + 4 * threads + 1


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_runs_when_the_block_has_ended(threads: int, error: type[BaseException] | None) -> None:
    work = Work()

    def run() -> None:
        with ordered_map(work, range(1000), threads) as results:
            assert next(results) == 0
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert work.running == 0
    assert work.started <= 4 * threads + 1


def test_workers_go_on_with_other_work_after_an_error() -> None:
    threads: set[threading.Thread] = set()

    def work(piece: int) -> int:
        threads.add(threading.current_thread())
        time.sleep(0.001)
        return 100 // piece

    with Workers(2) as workers:
        with pytest.raises(ZeroDivisionError), ordered_map(work, [5, 4, 0, 1, 2], workers) as results:
            list(results)
        with ordered_map(work, range(1, 20), workers) as results:
            assert list(results) == [100 // piece for piece in range(1, 20)]
    assert len(threads) <= 2


def test_who_asks_for_results_works_for_them() -> None:
    """Two pieces that each need the other to have begun: with two threads both begin."""
    both, threads = threading.Barrier(2), set[threading.Thread]()

    def work(piece: int) -> int:
        threads.add(threading.current_thread())
        if piece < 2:
            both.wait(timeout=60)
        return piece

    with ordered_map(work, range(10), 2) as results:
        assert list(results) == list(range(10))
    assert len(threads) == 2
    assert threading.current_thread() in threads


def test_there_is_no_way_to_use_it_without_a_block() -> None:
    unsafe: Any = ordered_map(len, [], 2)
    with pytest.raises(TypeError):
        iter(unsafe)


def test_threads_that_go_on_do_not_work_for_a_block_that_has_ended() -> None:
    work = Work()

    def run(workers: Workers) -> None:
        with ordered_map(work, range(1000), workers) as results:
            assert next(results) == 0
            raise KeyboardInterrupt

    with Workers(4) as workers:
        for _ in range(20):
            with pytest.raises(KeyboardInterrupt):
                run(workers)
            assert work.running == 0


def test_what_an_error_leaves_undone_is_never_done() -> None:
    workers, called = Workers(2), list[int]()
    workers._others.append(threading.current_thread())  # no other takes anything

    def failing(piece: int) -> int:
        called.append(piece)
        raise ValueError(piece)

    with pytest.raises(ValueError, match="0"), ordered_map(failing, range(10), workers) as results:
        list(results)
    with ordered_map(str, range(3), workers) as results:
        assert list(results) == ["0", "1", "2"]
    assert called == [0]


def test_an_interrupted_thread_does_not_wait_for_what_it_has_begun_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C just before the function is called."""
    run, interrupted = parallel._Piece.run, threading.Event()

    def run_or_interrupt(piece: parallel._Piece) -> None:
        if threading.current_thread() is threading.main_thread():
            piece.owner(threading.get_ident())
            interrupted.set()
            raise KeyboardInterrupt
        assert interrupted.wait(timeout=60)
        run(piece)

    monkeypatch.setattr(parallel._Piece, "run", run_or_interrupt)
    with pytest.raises(KeyboardInterrupt), ordered_map(str, range(10), 2) as results:
        list(results)


def test_threads_that_cannot_all_be_started_end(monkeypatch: pytest.MonkeyPatch) -> None:
    before, start = threading.active_count(), threading.Thread.start

    def failing(thread: threading.Thread) -> None:
        if thread.name.endswith("_3"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="new thread"), ordered_map(str, range(10), 4):
        pass
    assert threading.active_count() == before
