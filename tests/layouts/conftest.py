"""The fixture that saves with torch and locates what was saved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from statecodec.layouts import locate
from tests.contracts.layout import check_located
from tests.layouts.support import FoundFile, found_file


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """save(obj, **torch.save options) -> (path, located file)."""

    def save(obj: Any, name: str = "ckpt.pt", **options: Any) -> tuple[Path, FoundFile]:
        path = tmp_path / name
        torch.save(obj, path, **options)
        check_located(locate(path), {path.name: path.read_bytes()})
        return path, found_file(path)

    return save


@pytest.fixture(scope="session")
def saved_by_dcp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What save_dcp.py writes."""
    folder, script = tmp_path_factory.mktemp("dcp"), Path(__file__).with_name("save_dcp.py")
    command = [sys.executable, "-W", "ignore", str(script), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


@pytest.fixture(scope="session")
def dcp_alone(saved_by_dcp: Path) -> Path:
    """DCP folders `nested` and `flat` that one rank saved."""
    return saved_by_dcp / "alone"


@pytest.fixture(scope="session")
def dcp_sharded(saved_by_dcp: Path) -> Path:
    """The same, sharded over two ranks, with tensors large enough for lossy codecs."""
    return saved_by_dcp / "sharded"


@pytest.fixture(scope="session")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that DeepSpeed wrote, and what its own tool makes of them (see save_zero.py)."""
    folder = tmp_path_factory.mktemp("deepspeed")
    shutil.unpack_archive(Path(__file__).with_name("data") / "deepspeed.zip", folder)
    return folder
