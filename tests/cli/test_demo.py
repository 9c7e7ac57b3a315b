"""The small GPT: deterministic, resumable bit for bit, and saved the way others save."""

from __future__ import annotations

import functools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from statecodec_cli.demo.data import Corpus, standard_library
from statecodec_cli.demo.gpt import GPT, GPTConfig
from statecodec_cli.demo.train import TrainConfig, Trainer
from tests.cli.run import ROOT, Cli

TINY = TrainConfig(batch_size=2, eval_batches=1, model=GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library(limit=200_000)


def test_text_is_source_code_and_validation_is_other_text(corpus: Corpus) -> None:
    train, val = bytes(corpus.train.tolist()), bytes(corpus.val.tolist())
    assert b"import " in train
    assert b"import " in val
    assert val[:200] not in train


def test_a_batch_is_a_function_of_seed_and_step(corpus: Corpus) -> None:
    settings = {"batch_size": 3, "block_size": 8}
    x, y = corpus.batch(5, seed=1, **settings)
    again, _ = corpus.batch(5, seed=1, **settings)
    assert x.shape == y.shape == (3, 8)
    assert torch.equal(x, again)
    assert torch.equal(x[:, 1:], y[:, :-1])
    for other in (corpus.batch(6, seed=1, **settings), corpus.batch(5, seed=2, **settings)):
        assert not torch.equal(x, other[0])
    assert not torch.equal(x, corpus.batch(5, seed=1, split="val", **settings)[0])


def test_the_head_is_tied_and_matrices_decay() -> None:
    model = GPT(TINY.model)
    assert model.lm_head.weight is model.transformer["wte"].weight
    decay, rest = model.parameter_groups(0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decay["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_the_model_sees_no_future() -> None:
    torch.manual_seed(0)
    model = GPT(TINY.model)
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    ignored = torch.full((1, 16), -100)
    ignored[0, :15] = 7  # losses of all positions but the last
    assert torch.equal(model(tokens, ignored), model(changed, ignored))


def test_it_learns_and_the_same_seed_gives_the_same_losses(corpus: Corpus) -> None:
    first, second = (Trainer(TINY, corpus=corpus).run(30) for _ in range(2))
    assert first == second
    assert sum(first[-5:]) < sum(first[:5])


def test_resuming_is_bit_exact(corpus: Corpus, tmp_path: Path) -> None:
    whole = Trainer(TINY, corpus=corpus)
    whole.run(4)
    whole.save(tmp_path / "ckpt.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    expected = whole.run(3)
    resumed = Trainer.resume(tmp_path / "ckpt.pt", corpus=corpus)
    assert resumed.step == 4
    assert resumed.run(3) == expected
    assert resumed.losses == whole.losses
    assert resumed.validate() == whole.validate()


def test_the_checkpoint_is_nanogpt_style(corpus: Corpus, tmp_path: Path) -> None:
    trainer = Trainer(TINY, corpus=corpus)
    trainer.run(1)
    trainer.save(tmp_path / "ckpt.pt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert list(checkpoint) == ["model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"]
    assert checkpoint["model"]["lm_head.weight"].data_ptr() == checkpoint["model"]["transformer.wte.weight"].data_ptr()
    assert checkpoint["iter_num"] == 1


def test_the_example_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, what others began: those run in this one, which need not import torch again."""
    monkeypatch.chdir(tmp_path)
    command = [str(ROOT / "examples" / "gpt.py"), "--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16"]
    command += ["--batch-size=2"]

    def here(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *words])
        runpy.run_path(command[0], run_name="__main__")
        return capsys.readouterr().out

    def apart(*words: str) -> str:
        call = [sys.executable, *command, *words]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=120).stdout

    def losses(printed: str) -> list[float]:
        return [entry["loss"] for line in printed.splitlines() if "loss" in (entry := json.loads(line))]

    whole, half = (losses(here(f"--steps={n}", f"--out={n}.pt")) for n in (4, 2))
    assert whole == half + losses(apart("--steps=2", "--resume=2.pt", "--out=rest.pt"))


def test_the_demo_tells_the_whole_story(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=16)
    small = functools.partial(TrainConfig, batch_size=2, eval_batches=1, model=sizes)
    monkeypatch.setattr("statecodec_cli.demo.train.TrainConfig", small)
    folder = tmp_path / "demo"
    words = ("demo", "--dir", folder, "--steps", 4, "--resume-steps", 3)
    document = cli(*words, "--json", "--plot", tmp_path / "losses.svg").json()
    assert document["lossless_same_sha256"] is True
    assert [p["preset"] for p in document["presets"]] == ["lossless", "resume", "small", "tiny"]
    assert len(document["resumed"]["exact"]["losses"]) == len(document["resumed"]["restored"]["losses"]) == 3
    assert abs(document["difference"]["val_loss"]) < 0.01
    assert (tmp_path / "losses.svg").exists()

    cut = cli(
        "demo", "--dir", tmp_path / "cut", "--steps", 100_000, "--seconds", 1, "--resume-steps", 3, "--json"
    ).json()
    assert 1 <= cut["training"]["steps"] < 100_000
    assert len(cut["resumed"]["exact"]["losses"]) == len(cut["resumed"]["restored"]["losses"]) >= 1

    refused = cli(*words)
    assert refused.code == 1
    assert "output.exists" in refused.err
    again = cli(*words, "--force")
    assert again.code == 0
    assert "restored file: loss" in again.out
    assert "5/5 resuming from" in again.err
