"""What the verbs return prints as tables, and `load` takes a device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec.errors import UsageError
from tests.cli.run import checkpoint


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "ckpt.pt")


def test_reports_print_as_tables(ckpt: Path) -> None:
    made = statecodec.compress(ckpt)
    printed = str(made).splitlines()
    assert printed[0].startswith(f"{made.path}: ")
    assert f"{made.ratio:.2f}x, {made.bytes_per_param:.2f} B/param" in printed[0]
    heads = [line for line in printed if line.startswith("role ")]
    assert len(heads) == 1
    rows = printed[printed.index(heads[0]) + 1 :]
    assert {tuple(row.split()[:2]) for row in rows if row and ":" not in row} == {
        (t.role, t.codec.partition("(")[0]) for t in made.tensors
    }
    (direction,) = (row for row in rows if row.split()[:2] == ["exp_avg", "direction"])
    assert "exact" not in direction, "its error is one of the update"
    (line,) = (line for line in printed if line.startswith("step error: "))
    assert re.fullmatch(r"step error: update 0\.9\d* % \(asked 1 %\), weights 1\.9\d* % \(asked 2 %\)", line)
    assert direction.endswith(" %")
    plain = str(statecodec.inspect(ckpt))
    assert "exp_avg_sq" in plain
    assert "from" not in plain.splitlines()[0]


def test_comparisons_and_analyses_print_as_tables(ckpt: Path) -> None:
    same = statecodec.diff(ckpt, ckpt)
    assert str(same).splitlines()[0].endswith(": identical")
    made = statecodec.compress(ckpt)
    printed = str(statecodec.diff(ckpt, made.path))
    assert printed.splitlines()[0].endswith(": different")
    assert "weight" in printed
    assert re.search(r"\nstep error: update 0\.9\d* %, weights 1\.9\d* %$", printed)
    analysis = str(statecodec.analyze(ckpt, curve=True))
    assert "rules by type: " in analysis
    assert "resume" in analysis


def test_load_takes_a_device(ckpt: Path) -> None:
    made = statecodec.compress(ckpt, preset="lossless")
    for path in (ckpt, made.path):
        assert statecodec.load(path, map_location="cpu")["model"]["0.weight"].device.type == "cpu"
        assert statecodec.load(path, map_location=torch.device("meta"))["model"]["0.weight"].device.type == "meta"
        for wrong in ("nowhere", {"cuda": "cpu"}, lambda storage, location: storage):
            with pytest.raises(UsageError, match="map_location"):
                statecodec.load(path, map_location=wrong)  # type: ignore[arg-type]
