"""examples/fsdp2_train.py and lightning_train.py: trained on 2 ranks, killed, and resumed on other numbers of ranks."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from examples.fsdp2_train import INDEX, train
from statecodec.optim import AdamW
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


# --- Lightning

EPOCHS, LAST = 5, 2


def on_lightning(folder: Path, epochs: int, dies_after: int | None = None) -> list[float]:
    """The example on this rank, as torchrun would start it; `dies_after` so many epochs, in the middle of a save."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, GROUP_RANK="0", WORLD_SIZE=world, LOCAL_WORLD_SIZE=world,
        TORCHELASTIC_RUN_ID="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    from examples import lightning_train
    from statecodec.distributed import StatecodecWriter

    def save(_: object, checkpoint: dict[str, str]) -> None:
        checkpoint["saved_by"] = rank

    def load(_: object, checkpoint: dict[str, str]) -> None:
        assert checkpoint["saved_by"] == "0"

    lightning_train.Net.on_save_checkpoint, lightning_train.Net.on_load_checkpoint = save, load
    if dies_after is not None:
        write, saves = StatecodecWriter.write_data, []

        def dying(self: StatecodecWriter, *args: object) -> object:
            saves.append(1)
            if len(saves) > dies_after and rank == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, *args)

        StatecodecWriter.write_data = dying
    return lightning_train.train(folder, epochs)


def alone(epochs: int) -> list[float]:
    """What Lightning should do: the same network, data and optimizer in one process, in a plain loop."""
    from examples.lightning_train import Net, data

    module = Net()
    optimizer = AdamW(module.named_parameters(), lr=1e-2)
    for _ in range(epochs):
        for batch in data(0, 1):
            loss = module.training_step(batch, 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return module.losses


@pytest.mark.skipif(sys.version_info < (3, 11), reason="lightning is tested from Python 3.11 on")
def test_lightning_goes_on_with_another_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank \d of 2"):
        Ranks().run(2, on_lightning, tmp_path, EPOCHS, LAST)
    by_rank = ranks.run(3, on_lightning, tmp_path, EPOCHS)
    losses = torch.tensor(by_rank).mean(0).tolist()
    wanted = alone(EPOCHS)
    assert len(losses) == len(wanted) * (EPOCHS - LAST) // EPOCHS, "from the last whole checkpoint on"
    assert losses == pytest.approx(wanted[-len(losses) :], rel=0.01), "bf16 gradients are added in another order"
