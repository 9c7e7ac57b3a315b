from __future__ import annotations

import pytest

from statecodec_cli.progress import Lines, reporting


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_every_few_seconds_with_rate_and_time_left() -> None:
    clock, lines = Clock(), []
    progress = Lines(lines.append, clock)
    for second in range(11):
        clock.now = 100.0 + second
        progress(second * 10_000_000, 200_000_000, "compress")
    assert lines == [
        "compress: 25% of 200 MB, 10.0 MB/s, 15 s left",
        "compress: 50% of 200 MB, 10.0 MB/s, 10 s left",
    ]


def test_short_work_is_silent() -> None:
    clock, lines = Clock(), []
    progress = Lines(lines.append, clock)
    clock.now += 4.9
    progress(1, 2, "restore")
    assert lines == []


def test_a_new_stage_starts_its_own_rate() -> None:
    clock, lines = Clock(), []
    progress = Lines(lines.append, clock)
    progress(0, 100, "compress")
    clock.now += 60
    progress(0, 100_000_000, "verify")
    clock.now += 10
    progress(50_000_000, 100_000_000, "verify")
    assert lines[-1] == "verify: 50% of 100 MB, 5.00 MB/s, 10 s left"


@pytest.mark.parametrize("total", [0, 100])
def test_what_is_done_needs_no_line(total: int) -> None:
    clock, lines = Clock(), []
    progress = Lines(lines.append, clock)
    clock.now += 6
    progress(total, total, "compress")
    assert lines == []


def test_quiet_asks_the_library_for_no_callbacks() -> None:
    with reporting(quiet=True) as progress:
        assert progress is None
