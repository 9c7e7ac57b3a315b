"""What wrote a checkpoint is said where its files tell, survives compression, and is never a guess."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec.layouts import locate
from tests.frameworks.huggingface import Trained
from tests.frameworks.written import WRITERS, Written, nanochat, torchtune


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


AMBIGUOUS = {"Accelerate": 4, "torchtune": 4}
"""Parameters that have no name: their weights are sorted by name, and shapes leave open which is which."""


def test_states_have_the_names_of_their_weights(written: tuple[str, Written]) -> None:
    name, checkpoint = written
    source = locate(checkpoint.path)
    states = [t.param for t in source.tensors if t.role in ("exp_avg", "momentum")]
    assert len(states) == len(checkpoint.names)
    assert all(found in (None, wanted) for found, wanted in zip(states, checkpoint.names, strict=True))
    assert states.count(None) == AMBIGUOUS.get(name, 0)
    weights = {t.name: t.param for t in source.tensors if t.role == "weight"}
    assert sorted(map(str, weights.values())) == sorted(checkpoint.names)
    trained = [weights[m.weight] for m in (*source.moments, *source.momenta) if m.weight is not None]
    assert sorted(map(str, trained)) == sorted(filter(None, states))


def test_torchtune_s_states_that_have_names(tmp_path: Path) -> None:
    checkpoint = torchtune(tmp_path, by_name=True)
    assert [m.param for m in locate(tmp_path).moments] == checkpoint.names
    assert [m.weight for m in locate(tmp_path).moments] == [
        f"epoch_0/model-00001-of-00001.safetensors:{name}" for name in checkpoint.names
    ]


def test_weights_beside_an_optimizer_are_nobody_else_s(tmp_path: Path) -> None:
    """A checkpoint that lost its weights, beside one that has them."""
    for step in (1, 2):
        torchtune(tmp_path / str(step), by_name=True)
    (tmp_path / "1" / "recipe_state" / "recipe_state.pt").rename(tmp_path / "1" / "epoch_0" / "optimizer.pt")
    (tmp_path / "2" / "epoch_0" / "model-00001-of-00001.safetensors").unlink()
    weights = {m.exp_avg.partition("/")[0]: m.weight for m in locate(tmp_path).moments}
    assert str(weights["1"]).startswith("1/")
    assert weights["2"] is None


def test_a_name_that_two_files_of_a_folder_have_is_certain_nowhere(tmp_path: Path) -> None:
    for path in ("a/x.pt", "a/y.pt", "b/z.pt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        torch.save({"lin.weight": torch.randn(8, 64)}, tmp_path / path)
    state = {"lin.weight": {key: torch.rand(8, 64) for key in ("exp_avg", "exp_avg_sq")}}
    group = {"params": ["lin.weight"], "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
    (tmp_path / "o").mkdir()
    torch.save({"state": state, "param_groups": [group]}, tmp_path / "o" / "optimizer.pt")
    assert [m.weight for m in locate(tmp_path).moments] == [None]
    for name in ("x", "y"):
        (tmp_path / "a" / f"{name}.pt").unlink()
    assert [str(m.weight).partition("/")[0] for m in locate(tmp_path).moments] == ["b"]


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
