"""Accelerate saves compressed states and resumes from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from statecodec.errors import PolicyError, UsageError

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import ProjectConfiguration

from statecodec.integrations.accelerate import load_state, save_state

pytestmark = pytest.mark.filterwarnings("ignore")


class Run:
    """A model with dropout, so that resuming exactly needs the random state, too."""

    def __init__(self, **options: Any) -> None:
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._reset_state()
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, **options)
        model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.data = torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(1))

    def steps(self, start: int, stop: int) -> list[float]:
        found = []
        for x in self.data[start:stop]:
            loss = (self.model(x) - x.flip(-1)).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            found.append(float(loss))
        return found


@pytest.mark.parametrize(("preset", "most"), [("lossless", 0.0), ("resume", 1e-5)])
def test_an_interrupted_run_goes_on(preset: str, most: float, tmp_path: Path) -> None:
    first = Run()
    first.steps(0, 4)
    path = save_state(first.accelerator, tmp_path / "step-4", preset)
    wanted = first.steps(4, 12)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] == ["step-4.sc.safetensors"]
    second = Run()
    load_state(
        second.accelerator, path.with_name(path.name.removesuffix(".sc.safetensors"))
    )  # the folder's name will do
    found = second.steps(4, 12)
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= most
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_folders_are_loaded_and_what_is_refused(tmp_path: Path) -> None:
    run = Run()
    run.accelerator.save_state(str(tmp_path / "plain"))
    load_state(run.accelerator, tmp_path / "plain")
    with pytest.raises(PolicyError, match="huge"):
        save_state(run.accelerator, tmp_path / "x", "huge")
    assert not (tmp_path / "x").exists()
    named = Run(project_config=ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True))
    with pytest.raises(UsageError, match="counts folders"):
        save_state(named.accelerator, tmp_path / "x")
