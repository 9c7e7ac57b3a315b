from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from statecodec_cli.progress import Lines, reporting
from tests.cli.run import finished


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_every_few_seconds_with_rate_and_time_left() -> None:
    clock, lines = Clock(), []
    progress = Lines(lines.append, clock)
    for second in range(21):
        clock.now = 100.0 + second
        progress(second * 10_000_000, 400_000_000, "compress")
    assert lines == [
        "compress: 25% of 400 MB, 10.0 MB/s, 30 s left",
        "compress: 50% of 400 MB, 10.0 MB/s, 20 s left",
    ]


def test_short_work_is_silent() -> None:
    clock, lines = Clock(), []
    progress = Lines(lines.append, clock)
    clock.now += 9.9
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
    clock.now += 11
    progress(total, total, "compress")
    assert lines == []


def test_quiet_asks_the_library_for_no_callbacks() -> None:
    with reporting(quiet=True) as progress:
        assert progress is None


def test_what_the_library_logs_is_said_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with reporting(quiet=quiet):
            logging.getLogger("statecodec").info("compiling something")
    logging.getLogger("statecodec").info("afterwards nobody listens")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "compiling something\n")


def test_the_first_run_says_that_it_compiles_and_the_second_does_not(ckpt: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    words = ("compress", ckpt, "--force", "--preset", "lossless")  # which has few kernels
    first, second = (finished(*words, env=environment) for _ in range(2))
    assert (first.code, second.code) == (0, 0)
    assert first.err.splitlines()[0].startswith("compiling kernels for this machine")
    assert first.err.count("compiling") == 1
    assert "compiling" not in second.err
