"""The fixture that saves with torch and locates what was saved."""

from __future__ import annotations

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
