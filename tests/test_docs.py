"""The documents against the code: what exists is documented, what is documented exists, and the examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from statecodec import choose, codecs, errors
from statecodec_cli import reference
from statecodec_cli.main import VERBS
from tests.cli.run import checkpoint

ROOT = Path(__file__).parents[1]
START = (ROOT / "docs" / "start.md").read_text()
CLI = (ROOT / "docs" / "cli.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def every_error(base: type[errors.StatecodecError] = errors.StatecodecError) -> list[type[errors.StatecodecError]]:
    own = [child for child in base.__subclasses__() if child.__module__ == errors.__name__]
    return [cls for child in own for cls in (child, *every_error(child))]


def test_option_tables_are_up_to_date() -> None:
    assert reference.rewrite(CLI) == CLI, "run `make docs`"


def test_tables_of_measurements_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stderr}: run `make docs`"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_section_with_its_options(verb: str) -> None:
    assert f"\n## {verb}\n\n<!-- options: {verb} -->\n" in CLI


@pytest.mark.parametrize("name", codecs.names())
def test_every_codec_is_named(name: str) -> None:
    assert f"`{name}`" in CLI


@pytest.mark.parametrize("preset", choose.PRESETS)
def test_every_preset_is_in_the_table(preset: str) -> None:
    assert f"| `{preset}`" in CLI


@pytest.mark.parametrize("code", sorted({cls.code for cls in every_error()}))
def test_every_error_code_is_documented(code: str) -> None:
    assert f"`{code}`" in CLI


def test_no_error_code_is_invented() -> None:
    table = CLI[CLI.index("## Errors") :]
    cells = re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
    documented = {code for cell in cells for code in re.findall(r"`([^`]+)`", cell)}
    assert documented - {"io"} == {cls.code for cls in every_error()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    for block in blocks(START, "python"):
        model = torch.nn.Linear(80, 80)
        model(torch.randn(3, 80)).sum().backward()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer.step()
        names = {"model": model, "torch_adamw_state": optimizer.state_dict()}
        exec(compile(block, "start.md", "exec"), names)
