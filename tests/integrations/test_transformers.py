"""A Trainer that is interrupted and resumes from compressed checkpoints."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec import optim
from statecodec.errors import PolicyError, UsageError
from statecodec.integrations import replacing

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from statecodec.integrations.transformers import CompressCheckpoints, last_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
FILE = "checkpoint-{}.sc.safetensors"


def trainer(folder: Path, *, steps: int, every: int | None = None, limit: int | None = None, **more: Any):
    """A Trainer that saves every so many steps; each checkpoint starts a process, so there are few."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (64, 16))]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_strategy="steps" if every else "no", save_steps=every or 1,
        save_total_limit=limit, logging_steps=1,
        per_device_train_batch_size=4, learning_rate=3e-4, lr_scheduler_type="constant", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, callbacks=[CompressCheckpoints("lossless")], **more)


def losses(run: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """A run of 16 steps with compressed checkpoints at 8 and 16, and its losses."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    run = trainer(folder, steps=16, every=8)
    run.train()
    return folder, losses(run)


@pytest.fixture(scope="module")
def raw(straight: tuple[Path, dict[int, float]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Trainer's own folder at step 8."""
    folder = tmp_path_factory.mktemp("raw") / "checkpoint-8"
    statecodec.restore(straight[0] / FILE.format(8), folder)
    return folder


class ReplacedAtOnce:
    """Stands for the process that compresses, whose start takes seconds; `straight` has real ones."""

    done = True

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        replacing.replace_by_compressed(folder, options)

    def wait(self) -> str | None:
        return None


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statecodec.integrations.transformers.Replacing", ReplacedAtOnce)


@pytest.mark.usefixtures("at_once")
def test_a_lossless_one_resumes_exactly_and_the_limit_counts_both_forms(straight: Any, tmp_path: Path) -> None:
    folder, wanted = straight
    assert names(folder) == [FILE.format(16), FILE.format(8)]
    for step in (4, 8):
        (tmp_path / FILE.format(step)).hardlink_to(folder / FILE.format(8))
    run = trainer(tmp_path, steps=16, every=16, limit=2)
    with last_checkpoint(tmp_path) as checkpoint:
        assert checkpoint is not None
        run.train(resume_from_checkpoint=checkpoint)
    assert losses(run) == wanted
    assert names(tmp_path) == [FILE.format(16), FILE.format(8)]


def test_resume_is_as_close_as_it_promises(straight: Any, raw: Path, tmp_path: Path) -> None:
    report = statecodec.compress(raw, tmp_path / FILE.format(8), preset="resume")
    assert report.to_json()["ratio"] > 1.5
    run = trainer(tmp_path / "out", steps=16)
    with last_checkpoint(tmp_path / FILE.format(8)) as checkpoint:
        run.train(resume_from_checkpoint=checkpoint)
    found = losses(run)
    assert max(abs(found[step] - straight[1][step]) for step in range(9, 17)) <= 1e-5


@pytest.mark.usefixtures("at_once")
def test_what_a_killed_run_left_is_compressed_when_it_goes_on(straight: Any, raw: Path, tmp_path: Path) -> None:
    for step in (4, 6, 8, 12):
        shutil.copytree(raw, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()  # killed while it was written
    run = trainer(tmp_path, steps=16)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert {step: losses(run)[step] for step in range(9, 17)} == {step: straight[1][step] for step in range(9, 17)}
    assert names(tmp_path) == sorted([FILE.format(4), FILE.format(8), "checkpoint-12", "checkpoint-6"])
    statecodec.restore(tmp_path / FILE.format(8), tmp_path / "back")
    assert statecodec.diff(raw, tmp_path / "back").identical
    trainer(tmp_path, steps=1).train()
    assert "checkpoint-12" in names(tmp_path), "a run that begins anew touches nothing"


@pytest.mark.usefixtures("at_once")
def test_the_live_optimizers(tmp_path: Path) -> None:
    def live(steps: int, every: int | None = None, resume: str | None = None) -> Any:
        own = (optim.AdamW, {"lr": 1e-3, "dense_below": 0})
        run = trainer(tmp_path, steps=steps, every=every, optimizer_cls_and_kwargs=own)
        run.train(resume_from_checkpoint=resume)
        return run

    straight = live(6)
    live(4, every=4)
    with last_checkpoint(tmp_path / FILE.format(4)) as checkpoint:
        second = live(6, resume=checkpoint)
    assert losses(straight) == losses(second)
    assert type(second.optimizer.optimizer) is optim.AdamW


def test_the_best_stays_a_folder_and_failures_cost_nothing(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        torch.save({"w": torch.ones(9)}, tmp_path / f"checkpoint-{step}" / "w.pt")
    (tmp_path / FILE.format(3)).write_bytes(b"older")
    (tmp_path / "checkpoint-2" / "pipe").symlink_to("nowhere")  # compress refuses it
    callback = CompressCheckpoints()
    arguments = TrainingArguments(output_dir=str(tmp_path), save_total_limit=2, use_cpu=True, report_to=[])
    state = type("State", (), {"is_world_process_zero": True, "best_model_checkpoint": str(tmp_path / "checkpoint-1")})
    for state.global_step in (1, 2, 3):
        callback.on_save(arguments, state, None)
        assert (tmp_path / "checkpoint-1").is_dir()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", FILE.format(3)]
    (tmp_path / "checkpoint-3" / "pipe").symlink_to("nowhere")
    callback.on_train_end(arguments, state, None)
    assert "checkpoint-3 stays as it is" in caplog.text
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", FILE.format(3)]


def test_options_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="huge"):
        CompressCheckpoints("huge")
    with pytest.raises(UsageError):
        CompressCheckpoints(max_step_error=7)
    with last_checkpoint(tmp_path) as checkpoint:
        assert checkpoint is None


KILLED = ("Staging.publish", "replacing.os.rename", "replacing.shutil.rmtree")
"""Where a process is killed that replaces a folder by a compressed file."""
PROGRAM = """
import os, signal, sys, shutil
from pathlib import Path
from statecodec.integrations import replacing
from statecodec.staging import Staging
def die(*a, ignore_errors=False, **k):
    if not ignore_errors:  # which is how what an earlier kill left is removed
        os.kill(os.getpid(), signal.SIGKILL)
for where in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        exec(f"{where} = die")
        replacing.replace_by_compressed(Path(sys.argv[1], where, "checkpoint-8"), {})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9, where
"""


def test_a_kill_leaves_a_checkpoint_that_can_be_resumed_from(raw: Path, tmp_path: Path) -> None:
    folders = [tmp_path / where / "checkpoint-8" for where in KILLED]
    for folder in folders:
        shutil.copytree(raw, folder)
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), *KILLED], check=True)
    wanted = {p.name: p.read_bytes() for p in raw.iterdir()}
    for folder in folders[:2]:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == wanted
        with last_checkpoint(folder.parent) as checkpoint:
            assert checkpoint == str(folder), "the framework's own is used as long as it is whole"
    with last_checkpoint(folders[2].parent) as checkpoint:
        assert checkpoint not in (None, str(folders[2]))
        assert {p.name for p in Path(checkpoint).iterdir()} == set(wanted)
