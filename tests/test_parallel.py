"""Results come in order, errors stop the rest, and nothing runs when the block has ended."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

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
    assert work.started <= 50 + 2 * threads + 1


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
    assert work.started <= 2 * threads + 1


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
