"""The processes that run these tests: what becomes of one that hangs."""

from __future__ import annotations

import signal

import pytest

from tests.distributed import ranks as module
from tests.distributed.ranks import Ranks


def forever() -> None:
    signal.pause()


def seven() -> int:
    return 7


def test_a_rank_that_hangs_says_where_and_nobody_gets_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Ranks()
    assert started.run(1, seven) == [7]
    with monkeypatch.context() as patch:
        patch.setattr(module, "PATIENCE", 0)
        with pytest.raises(AssertionError, match=r"(?s)ranks \[0\] of 1 did not answer; rank 0:.* in forever"):
            started.run(1, forever)
    assert started.run(1, seven) == [7]
    started.stop()
