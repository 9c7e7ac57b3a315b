"""Every pair of `compress` options keeps what each of the two states: no option undoes another's promise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec.checkpoint.report import Report

ROWS, COLS = 96, 256


def wide(path: Path, seed: int = 0) -> Path:
    """Moments whose rows span forty octaves, as behind dead units: a preset's 8-bit codes do not suit them."""
    generator = torch.Generator().manual_seed(seed)
    reach = 2.0 ** -(40 * torch.rand(ROWS, COLS, generator=generator))
    state = {
        "step": torch.tensor(50.0),
        "exp_avg": torch.randn(ROWS, COLS, generator=generator) * reach.sqrt(),
        "exp_avg_sq": reach * torch.rand(ROWS, COLS, generator=generator).clamp(min=0.1),
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-12, "weight_decay": 0.0, "params": [0]}
    model = {"w": torch.randn(ROWS, COLS, generator=generator)}
    torch.save({"model": model, "optimizer": {"state": {0: state}, "param_groups": [group]}}, path)
    return path


@dataclass(frozen=True)
class Done:
    """One call of `compress`: its options, the report, the source, and what it restores to."""

    options: dict[str, Any]
    report: Report
    source: Path
    restored: Path

    def codec(self, role: str) -> str:
        return next(t.codec for t in self.report.tensors if t.role == role)

    @property
    def error(self) -> dict[str, float]:
        return statecodec.diff(self.source, self.restored).total


def _resume(done: Done) -> None:
    if "max_update_error" not in done.options:
        assert done.error["u_rms"] < 0.01001
    if "max_weight_error" not in done.options:
        assert done.error["weight_step_error"] < 0.02002


def _rule(done: Done) -> None:
    assert done.codec("exp_avg_sq") == "raw"
    assert done.error["exp_avg_sq_relative_rms"] == 0


def _no_update_left(done: Done) -> None:
    assert done.error["u_rms"] <= 0.05005
    if "rules" not in done.options:  # the rule keeps exp_avg_sq exact: exp_avg is still as asked
        assert (done.report.total or {})["u_rms"] <= 0.05005


def _weights(done: Done) -> None:
    assert done.error["weight_step_error"] <= 0.3003


def _plain(done: Done) -> None:
    with statecodec.open(done.report.path) as checkpoint:
        assert checkpoint.read_encoded("model.w").parts


def _shards(done: Done) -> None:
    assert len(done.report.files) > 1


def _linked(done: Done) -> None:
    assert all(tensor.identical for tensor in statecodec.diff(done.restored, done.report.path).tensors)


def _verified(done: Done) -> None:
    assert done.report.total is not None


def _digest(done: Done) -> None:
    assert done.report.source["sha256"] == hashlib.sha256(done.source.read_bytes()).hexdigest()


OPTIONS: dict[str, tuple[Any, Callable[[Done], None]]] = {
    "preset": ("resume", _resume),
    "rules": (["exp_avg_sq=raw"], _rule),
    "max_update_error": (0.05, _no_update_left),
    "max_weight_error": (0.3, _weights),
    "pack": ("none", _plain),
    "max_shard_size": (60_000, _shards),
    "base": ("base.sc.safetensors", _linked),
    "verify": (True, _verified),
    "sha256": (True, _digest),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the compressed one of a step before."""
    made = tmp_path_factory.mktemp("options")
    statecodec.compress(wide(made / "before.pt", 1), made / "base.sc.safetensors")
    wide(made / "wide.pt")
    return made


@pytest.mark.parametrize(("first", "second"), list(combinations(OPTIONS, 2)))
def test_two_options_keep_what_each_states(first: str, second: str, folder: Path, tmp_path: Path) -> None:
    options = {name: OPTIONS[name][0] for name in (first, second)}
    given = {**options, **({"base": folder / options["base"]} if "base" in options else {})}
    report = statecodec.compress(folder / "wide.pt", folder / f"{first}-{second}.sc.safetensors", force=True, **given)
    restored = tmp_path / "restored.pt"
    statecodec.restore(report.path, restored)
    done = Done(options, report, folder / "wide.pt", restored)
    for name in (first, second):
        OPTIONS[name][1](done)
    for file in report.files:
        Path(file).unlink(missing_ok=True)


def test_what_a_preset_could_not_do_is_said(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"optimizer": {"state": {0: {"codes": torch.arange(8192).to(torch.uint8)}}, "param_groups": []}}, path)
    for preset in ("weights", "small"):
        report = statecodec.compress(path, tmp_path / f"{preset}.sc.safetensors", preset=preset)
        assert report.unmet
        assert report.to_json()["unmet"] == list(report.unmet)
        assert set(report.unmet) <= set(report.notes)
    assert not statecodec.compress(path, tmp_path / "l.sc.safetensors", preset="lossless").unmet
    assert not statecodec.compress(wide(tmp_path / "wide.pt"), tmp_path / "w.sc.safetensors", preset="weights").unmet
