"""Names in a checkpoint are somebody else's text: they must not steer the terminal that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.run import Cli

EVIL = "w\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202etxt"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def test_control_characters_in_names_are_escaped(cli: Cli, tmp_path: Path) -> None:
    source, packed = tmp_path / "a.pt", tmp_path / "a.sc.safetensors"
    torch.save({"model": {EVIL: torch.randn(100, 100)}}, source)
    calls = (
        ("compress", source, "-q", "--all", "--rule", "weight=companded(curve=log)"),  # refused values make a note
        ("inspect", source, "--all"),
        ("inspect", packed, "--all"),
        ("diff", source, packed, "-q", "--all"),
        ("verify", packed, "-q"),
    )
    for words in calls:
        done = cli(*words)
        assert done.code == 0, done.err
        text = (done.out + done.err).replace("\n", "")
        assert text.isprintable(), ascii(text)
    assert "\\x1b" in cli("inspect", packed, "--all").out


def test_control_characters_in_errors_are_escaped(cli: Cli, tmp_path: Path) -> None:
    target = tmp_path / "nothing\x1b[2J"
    target.write_bytes(b"x")
    done = cli("inspect", target)
    assert done.code == 1
    assert done.err.replace("\n", "").isprintable()


def test_a_sharded_output_is_shown_under_the_name_that_opens_it(cli: Cli, tmp_path: Path) -> None:
    torch.save({"model": {str(i): torch.randn(100, 100) for i in range(4)}}, tmp_path / "a.pt")
    done = cli("compress", tmp_path / "a.pt", "-q", "--json", "--max-shard-size", "50KB")
    path = Path(done.json()["path"])
    assert path.is_file()
    assert cli("verify", path, "-q").code == 0
