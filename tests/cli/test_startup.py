"""What only reads headers imports no torch: help, the list of codecs, inspect, and every refusal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import statecodec
from tests.cli.run import ROOT, Cli, checkpoint

RUNNER = """
import contextlib, io, json, sys
from statecodec_cli.main import main
found = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    heavy = sorted({"torch", "numba", "triton"} & sys.modules.keys())
    found.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": heavy})
print(json.dumps(found))
"""


SECONDS = r'"seconds": [0-9.e-]+,'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of every kind, and files that are none."""
    weights = {"a.weight": torch.randn(40, 30), "a.bias": torch.randn(40).to(torch.bfloat16)}
    made = checkpoint(tmp_path / "ckpt.pt")
    statecodec.compress(made)
    (tmp_path / "shards").mkdir()
    statecodec.compress(made, tmp_path / "shards" / "x.sc.safetensors", max_shard_size=100_000)
    save_file(weights, tmp_path / "weights.safetensors")
    odd = {"size": torch.Size([2, 3]), "dtype": torch.int16, "device": torch.device("cuda", 1)}
    odd |= {"sparse": torch.eye(3).to_sparse(), "tied": [weights["a.weight"], weights["a.weight"].t()]}
    torch.save(odd, tmp_path / "odd.pt")
    torch.save(OrderedDict(weights), tmp_path / "state_dict.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed
        dcp.save(dict(weights), checkpoint_id=tmp_path / "dcp")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "cut.pt").write_bytes(made.read_bytes()[:5000])
    (tmp_path / "damaged.sc.safetensors").write_bytes((tmp_path / "ckpt.sc.safetensors").read_bytes()[:5000])
    return tmp_path


CALLS = [
    ["--help"], [], ["--version"], ["compress", "--help"], ["codecs"], ["codecs", "--json"], ["nonsense"],
    *(["inspect", name] for name in (
        "ckpt.pt", "ckpt.sc.safetensors", "shards/x.sc.safetensors", "weights.safetensors", "odd.pt", "state_dict.pt",
        "dcp", ".", "notes.txt", "cut.pt", "damaged.sc.safetensors", "empty", "nowhere",
    )),
    ["inspect", "ckpt.pt", "--json"], ["inspect", "ckpt.sc.safetensors", "--all"],
    ["compress", "ckpt.pt"], ["compress", "notes.txt"], ["compress", "empty"], ["compress", "ckpt.sc.safetensors"],
    ["compress", "ckpt.pt", "-f", "--preset", "huge"], ["compress", "ckpt.pt", "-f", "--rule", "exp_avg=nothing"],
    ["compress", "ckpt.pt", "-f", "--pack", "zip"], ["compress", "ckpt.pt", "-f", "--max-step-error", "3"],
    ["compress", "ckpt.pt", "-f", "--base", "ckpt.pt"],
    ["restore", "ckpt.pt"], ["restore", "ckpt.sc.safetensors"], ["restore", "notes.txt"],
    ["verify", "ckpt.pt"], ["verify", "weights.safetensors"], ["verify", "damaged.sc.safetensors"],
    ["diff", "ckpt.pt", "notes.txt"], ["analyze", "notes.txt"],
    ["convert", "ckpt.pt", "ckpt.sc.safetensors", "--to", "exp_avg=raw"],
    ["convert", "ckpt.pt", "x.pt", "--to", "nothing"],
    ["demo", "--dir", "."],
]  # fmt: skip


def test_headers_and_refusals_need_no_torch(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'cli'}")
    monkeypatch.setenv("COLUMNS", "100")
    command = [sys.executable, "-c", RUNNER, json.dumps(CALLS)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for words, found in zip(CALLS, json.loads(child.stdout), strict=True):
        assert found.pop("heavy") == [], words
        here = cli(*words)  # in this process, which has torch
        assert found["code"] == here.code
        assert found["err"] == here.err
        assert re.sub(SECONDS, "", found["out"]) == re.sub(SECONDS, "", here.out)
