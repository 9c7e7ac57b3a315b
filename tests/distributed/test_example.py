"""examples/fsdp2_train.py: trained on 2 ranks, killed, and resumed on 1, 3 and 4."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from examples.fsdp2_train import INDEX, train
from tests.distributed.ranks import Ranks

STEPS, EVERY = 10, 4


def die(step: int) -> None:
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path) -> None:
    train(folder, STEPS, EVERY, die)


def test_a_killed_run_goes_on_with_other_numbers_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    (straight, _) = ranks.run(2, train, tmp_path / "straight", STEPS, EVERY)
    assert len(straight) == STEPS
    assert straight[-1] < straight[0]
    with pytest.raises(AssertionError, match=r"rank \d of 2"):
        Ranks().run(2, killed, tmp_path / "killed")
    assert (tmp_path / "killed" / INDEX).exists()
    for n in (1, 3, 4):
        folder = shutil.copytree(tmp_path / "killed", tmp_path / str(n))
        losses = ranks.run(n, train, folder, STEPS, EVERY)[0]
        assert len(losses) == STEPS - 8, "from the last checkpoint on"
        assert losses == pytest.approx(straight[8:], rel=0.02), "bf16 gradients are added in another order"
