"""The processes that run these tests: what becomes of one that hangs."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ranks as module
from tests.distributed.ranks import Ranks


def forever(begun: Path) -> None:
    begun.touch()
    while True:
        signal.pause()


def seven() -> int:
    return 7


def test_a_rank_that_hangs_says_where_and_nobody_gets_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "begun"

    def in_vain(*_: Any) -> list[Any]:
        """Wait until the rank is where it stays."""
        while not begun.exists():
            time.sleep(0.01)
        return []

    started = Ranks()
    assert started.run(1, seven) == [7]
    with monkeypatch.context() as patch:
        patch.setattr(module, "wait", in_vain)
        with pytest.raises(AssertionError, match=r"(?s)ranks \[0\] of 1 did not answer; rank 0:.* in forever"):
            started.run(1, forever, begun)
    assert started.run(1, seven) == [7]
    started.stop()
