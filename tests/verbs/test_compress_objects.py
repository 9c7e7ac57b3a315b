"""compress(object, path): what compressing its torch.save file would give, without that file."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec.errors import OutputExists, UsageError


def trained() -> dict[str, Any]:
    """A checkpoint with tied weights, views, a shared large storage with scalars in it, and settings."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(160, 160), torch.nn.GELU(), torch.nn.Linear(160, 160))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 160)).square().mean().backward()
        optimizer.step()
    flat = torch.randn(40_000)
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "views": [flat[7], flat[100:200], flat[::3]],
        "step": 3, "args": {"lr": 1e-3}, "size": torch.Size([2]), "odd": OrderedDict(a=torch.zeros(0), b=torch.eye(3)),
    }  # fmt: skip


def records(path: Path) -> list[tuple[str, int, bytes]]:
    """Every record of a torch file with its place, its CRC checked; not the id that torch makes from checksums."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        found = [(info.filename, info.header_offset, archive.read(info)) for info in archive.infolist()]
    assert found[-1][0].endswith(".data/serialization_id")
    return found[:-1]


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("preset", ["lossless", "resume", "live"])
def test_it_is_what_the_file_would_give(preset: str, tmp_path: Path, spool: Path) -> None:
    value = trained()
    torch.save(value, tmp_path / "x.pt")
    from_file = statecodec.compress(tmp_path / "x.pt", tmp_path / "file.sc.safetensors", preset=preset, verify=True)
    report = statecodec.compress(value, tmp_path / "x.sc.safetensors", preset=preset, verify=True)
    assert list(spool.glob("statecodec-*")) == []
    assert report.source == {**from_file.source, "sha256": None}
    skeleton, *tensors = report.tensors
    assert skeleton.name == "skeleton"
    assert tuple(tensors) == from_file.tensors[1:]
    assert report.total == from_file.total
    statecodec.restore(tmp_path / "x.sc.safetensors", tmp_path / "again.pt")
    statecodec.restore(tmp_path / "file.sc.safetensors", tmp_path / "expected.pt")
    assert records(tmp_path / "again.pt") == records(tmp_path / "expected.pt")
    if preset == "lossless":
        assert records(tmp_path / "again.pt") == records(tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "again.pt", weights_only=True)
    assert loaded["model"]["0.weight"].data_ptr() == loaded["model"]["2.weight"].data_ptr()


def test_the_large_tensors_are_not_written_first(tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    real = torch.save

    def saved(value: Any, path: Any) -> None:
        real(value, path)
        used.append(os.stat(path).st_blocks * 512)

    monkeypatch.setattr(torch, "save", saved)
    statecodec.compress({"a": torch.randn(1 << 20)}, tmp_path / "x.sc.safetensors", preset="lossless")
    assert used
    assert max(used) < 1 << 18


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path: Path, spool: Path) -> None:
    target = tmp_path / "x.sc.safetensors"
    with pytest.raises(UsageError, match="say where to write"):
        statecodec.compress({"a": torch.zeros(3)})
    for value in ({"f": lambda: 0}, {"f": open}, {"a": torch.zeros(3).to_sparse(), "g": (i for i in range(3))}):
        with pytest.raises(UsageError, match=r"torch.save does not take|no file"):
            statecodec.compress(value | {"f": (lambda: 0)}, target)
    assert not target.exists()
    statecodec.compress({"a": torch.zeros(3)}, target)
    with pytest.raises(OutputExists):
        statecodec.compress({"a": torch.zeros(3)}, target)
    assert list(spool.glob("statecodec-*")) == []
