"""`compress --shard` and `finalize` as programs: side by side, killed, started again."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from statecodec_cli.main import main
from tests.cli.run import finished
from tests.forks import forks


def program(words: list[str]) -> None:
    sys.exit(main(words))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.randn(64, 512), "exp_avg_sq": torch.rand(64, 512)}
        for i in range(20)
    }
    path = tmp_path / "ckpt.pt"
    torch.save({"optimizer": {"state": state, "param_groups": [{"params": list(range(20)), "lr": 1e-3}]}}, path)
    return path


def test_processes_side_by_side_one_of_them_killed(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["compress", str(checkpoint), "-o", str(tmp_path / "whole"), "-q", "--json"]) == 0
    calls = [["compress", str(checkpoint), "--shard", f"{i}/3", "-q"] for i in (1, 2, 3)]
    running = [forks().Process(target=program, args=(call,)) for call in calls]
    for process in running:
        process.start()
    while running[1].is_alive() and not list(tmp_path.glob(".ckpt.sc.safetensors.share-2-*")):
        time.sleep(0.005)  # until it writes
    running[1].kill()
    for process in running:
        process.join()
    assert [process.exitcode for process in (running[0], running[2])] == [0, 0]
    if running[1].exitcode == 0:  # it was done before it could be killed
        (tmp_path / "ckpt.sc.safetensors.share-2-of-3").unlink()
    refused = finished("finalize", checkpoint, "--json")
    assert refused.code == 2
    assert "1 of 3 shares" in refused.err + refused.out
    assert main(["compress", str(checkpoint), "--shard", "2/3", "-q"]) == 0
    assert main(["finalize", str(checkpoint), "--verify", "-q"]) == 0
    assert (tmp_path / "ckpt.sc.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not list(tmp_path.glob("*share*"))
    assert not list(tmp_path.glob(".ckpt*"))  # nor anything of the killed process


def test_what_is_printed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(checkpoint), "--shard", "1/2", "-q"]) == 0
    assert "share 1/2: " in capsys.readouterr().out
    assert main(["compress", str(checkpoint), "--shard", "1/2", "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["made"] is False
    assert main(["compress", str(checkpoint), "--shard", "2/2", "-q"]) == 0
    capsys.readouterr()
    assert main(["finalize", str(checkpoint), "-q"]) == 0
    assert "ckpt.sc.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--verify"], ["--plot", "x.svg"], ["-o", "-"]])
def test_a_share_is_no_whole_file(option: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(checkpoint), "--shard", "1/2", *option]) == 2
    assert "--shard" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--threads", "2"], ["-o", "-"]])
def test_what_ray_decides_is_not_asked_for(
    option: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(checkpoint), "--ray", "auto", *option]) == 2
    assert "--ray" in capsys.readouterr().err


def test_ray_that_is_not_there(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["compress", str(checkpoint), "--ray", "auto"]) == 1
    assert "statecodec[ray]" in capsys.readouterr().err
