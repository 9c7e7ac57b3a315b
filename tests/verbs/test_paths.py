"""Names of outputs that follow from names of inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import statecodec
from statecodec.errors import UsageError
from statecodec.verbs.paths import compressed_path, restored_path


@pytest.mark.parametrize("written", [".", "../run", "sub/.."])
def test_a_directory_by_a_path_without_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    (tmp_path / "run" / "sub").mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path / "run")
    report = statecodec.compress(written)
    assert Path(report.path).resolve() == tmp_path / "run.sc.safetensors"
    assert report.source["name"] == "run"


def test_a_source_that_is_called_as_a_compressed_file_is_not_replaced(tmp_path: Path) -> None:
    source = tmp_path / "ckpt.sc.safetensors"
    save_file({"w": torch.ones(3)}, source)
    with pytest.raises(UsageError, match="the source itself"):
        statecodec.compress(source, force=True)


def test_the_root_has_no_name() -> None:
    with pytest.raises(UsageError, match="say where to write"):
        compressed_path(Path("/"))


@pytest.mark.parametrize(
    ("name", "restored"),
    [("ckpt.pt", "ckpt.pt"), ("a\\b", "a\\b"), ("..", "restored"), (None, "restored"), ("/etc/x\n", "_etc_x_")],
)
def test_restored_names(name: str | None, restored: str) -> None:
    assert restored_path(Path("d/c"), name) == Path("d") / restored
