"""diff names what differs beside the tensors, of torch files, safetensors files and folders, compressed or not."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import statecodec
from statecodec.verbs.value_diff import value_diffs
from tests.cli.run import Cli, checkpoint


@pytest.fixture
def changed(tmp_path: Path) -> tuple[Path, Path]:
    first = checkpoint(tmp_path / "a.pt")
    value = torch.load(first, weights_only=True)
    value |= {
        "rng": [random.Random(1).getstate(), np.arange(9)],
        "config": Namespace(lr=1e-3, name="x"),
        "nan": float("nan"),
    }
    torch.save(value, first)
    value["optimizer"]["param_groups"][0]["lr"] = 5e-4
    value["iter_num"], value["config"], value["new"] = 9, Namespace(lr=2e-3, name="x"), "hello"
    del value["optimizer"]["param_groups"][0]["capturable"]
    value["rng"] = [random.Random(2).getstate(), np.arange(9)]
    torch.save(value, tmp_path / "b.pt")
    return first, tmp_path / "b.pt"


def test_settings_are_named(changed: tuple[Path, Path], tmp_path: Path) -> None:
    packed = statecodec.compress(changed[1], preset="lossless").path
    for second in (changed[1], packed):
        found = {v.name: (v.a, v.b) for v in statecodec.diff(changed[0], second).values}
        assert found == {
            "rng.0.1": ("tuple of 625", "tuple of 625"),
            "optimizer.param_groups.0.lr": ("0.001", "0.0005"), "optimizer.param_groups.0.capturable": ("False", "-"),
            "iter_num": ("3", "9"), "config.lr": ("0.001", "0.002"), "new": ("-", "hello"),
        }  # fmt: skip
    assert statecodec.diff(changed[1], packed).values == ()
    printed = str(statecodec.diff(*changed))
    assert "optimizer.param_groups.0.lr: 0.001 in A, 0.0005 in B" in printed


def test_the_command_line_names_them_too(
    capsys: pytest.CaptureFixture[str], changed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = Cli(capsys)
    monkeypatch.setenv("COLUMNS", "60")
    out = cli("diff", *changed, "-q").out
    assert max(map(len, out.splitlines())) <= 60
    (line,) = (line for line in out.splitlines() if line.startswith("iter_num"))
    assert line.split() == ["iter_num", "3", "9"]
    values = cli("diff", *changed, "--json", "-q").json()["values"]
    assert {"name": "iter_num", "a": "3", "b": "9"} in values


def test_metadata_and_files_of_folders(tmp_path: Path) -> None:
    for name, step in (("a", "1"), ("b", "2")):
        folder = tmp_path / name
        folder.mkdir()
        torch.save({"step": int(step), "w": torch.zeros(3)}, folder / "state.pt")
        (folder / "config.json").write_text(json.dumps({"step": step}))
        save_file({"w": torch.zeros(3)}, folder / "w.safetensors", metadata={"step": step})
    report = statecodec.diff(tmp_path / "a", tmp_path / "b")
    assert set(report.rest_differs) == {"config.json", "state.pt", "w.safetensors"}
    named = {v.name for v in report.values}
    assert {"state.pt.step", "config.json"} <= named


def test_values_of_every_kind() -> None:
    loop: list[Any] = []
    loop.append(loop)
    same: list[Any] = [float("nan"), np.float32(1), np.array([np.nan]), loop, (1, [2]), {3}, b"x", torch.zeros(3), None]
    other: list[Any] = [float("nan"), np.float32(1), np.array([np.nan]), loop, (1, [2]), {3}, b"x", torch.ones(3), None]
    assert value_diffs(same, other) == ()
    assert value_diffs({"a": OrderedDict(b=1)}, {"a": defaultdict(int, b=1)}) == ()
    long = {"x": "y" * 10_000, "n": 1 << 10_000, "b": bytes(500), "t": torch.zeros(2, 3), "\x1b[31m": 1, "one": 1}
    for diff in value_diffs(long, dict.fromkeys(long, 0) | {"one": True}):
        assert len(diff.a) <= 60
    assert len(value_diffs([[i] for i in range(5000)], [[i + 1] for i in range(5000)])) == 200
    assert [(d.name, d.a, d.b) for d in value_diffs([1], [1, 2])] == [("1", "-", "2")]
    assert value_diffs([], [torch.zeros(3)]) == ()
    assert [(d.name, d.b) for d in value_diffs({}, {"a": {"b": torch.zeros(3)}})] == [("a", "dict of 1")]
    assert [(d.name, d.a, d.b) for d in value_diffs(1, "1")] == [("value", "1", "1")]
