"""What wrote a checkpoint is said where its files tell, survives compression, and is never a guess."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import statecodec
from tests.frameworks.huggingface import Trained
from tests.frameworks.written import WRITERS, Written, nanochat


@pytest.fixture(scope="module", params=list(WRITERS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Written]:
    return request.param, WRITERS[request.param](tmp_path_factory.mktemp("written"))


def framework(path: Path) -> str | None:
    found: str | None = statecodec.inspect(path).to_json()["source"].get("framework")
    return found


def test_frameworks_are_named(written: tuple[str, Written], tmp_path: Path) -> None:
    name, checkpoint = written
    said = framework(checkpoint.path)
    assert name in str(said)
    made = statecodec.compress(checkpoint.path, tmp_path / "x.sc.safetensors")
    assert made.source["framework"] == said
    assert framework(tmp_path / "x.sc.safetensors") == said


def test_trainer(by_trainer: Callable[[str], Trained]) -> None:
    assert framework(by_trainer("gpt2").folder) == "transformers Trainer"
    assert framework(by_trainer("gpt2").folder / "optimizer.pt") is None


def test_names_alone_are_no_evidence(tmp_path: Path) -> None:
    for name in ("trainer_state.json", "common.pt", "metadata.json", ".metadata", "meta_1.json", "random_states_0.pkl"):
        (tmp_path / name).write_text("{}")
    torch.save({"weight": torch.ones(2)}, tmp_path / "model_1.pt")
    torch.save({"state": torch.ones(2)}, tmp_path / "random_states_1.pkl")
    torch.save({"pytorch-lightning_version": None, "state_dict": {}}, tmp_path / "last.ckpt")
    assert framework(tmp_path) is None


def test_nanochat_needs_its_settings(tmp_path: Path) -> None:
    nanochat(tmp_path)
    assert framework(tmp_path) == "nanochat"
    (tmp_path / "meta_000010.json").write_text(json.dumps({"step": 10}))
    assert framework(tmp_path) is None


def test_no_end_of_frameworks(tmp_path: Path) -> None:
    """What is said stays short enough for a compressed file to hold it."""
    for i in range(100):
        saved = {"pytorch-lightning_version": f"{i}.0.1", "state_dict": {"w": torch.ones(2)}}
        torch.save(saved, tmp_path / f"{i}.ckpt")
    torch.save({"pytorch-lightning_version": "9\x1b[2J" * 1000}, tmp_path / "x.ckpt")
    said = str(framework(tmp_path))
    assert len(said) < 300
    assert said.endswith("; 93 more")
    assert said.isprintable()
    statecodec.compress(tmp_path, tmp_path.with_suffix(".sc.safetensors"))
    assert framework(tmp_path.with_suffix(".sc.safetensors")) == said
