from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.run import Cli, checkpoint


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.delenv("COLUMNS", raising=False)  # lines are as wide as there, whoever runs the tests
    return Cli(capsys)


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """A small AdamW checkpoint, alone in its folder."""
    return checkpoint(tmp_path / "ckpt.pt")
