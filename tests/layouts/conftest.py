"""The fixture that saves with torch and locates what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from statecodec.layouts import SourceFile, locate
from tests.layouts.support import check_file


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """save(obj, **torch.save options) -> (path, located file)."""

    def save(obj: Any, name: str = "ckpt.pt", **options: Any) -> tuple[Path, SourceFile]:
        path = tmp_path / name
        torch.save(obj, path, **options)
        file = locate(path).files[0]
        check_file(file)
        return path, file

    return save
