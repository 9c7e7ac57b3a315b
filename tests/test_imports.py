"""What importing costs: nothing heavy may come in before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import statecodec

HEAVY = ("numba", "triton", "fastapi", "typer", "rich", "matplotlib", "ray", "dbos", "transformers", "lightning")


def loaded_by(program: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after the program."""
    ending = "; import sys; sys.stdout.write('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", program + ending], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.splitlines()[-1].split())


def test_the_library_is_light() -> None:
    assert loaded_by("import torch, statecodec").isdisjoint(HEAVY)


def test_completion_knows_the_public_names() -> None:
    assert set(statecodec.__all__) <= set(dir(statecodec))


def test_the_public_names_are_there_and_still_light() -> None:
    assert {"compress", "restore", "inspect", "verify", "diff", "open", "load", "save"} <= set(statecodec.__all__)
    program = "import statecodec; " + "; ".join(f"statecodec.{name}" for name in statecodec.__all__)
    assert loaded_by(program).isdisjoint(set(HEAVY) - {"numba"})


def test_the_optimizers_are_there_once_the_package_is() -> None:
    assert "torch" in loaded_by("import statecodec; statecodec.optim.AdamW, statecodec.errors.UsageError")


def imported(path: Path) -> set[str]:
    """Top-level names of what a module imports as soon as it is imported, type checkers' imports left out."""
    tree = ast.parse(path.read_text())
    return {
        (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }


def test_only_numerics_import_torch_at_once() -> None:
    """Everything else takes it from `statecodec.lazy`: reading a header costs no second."""
    package = Path(statecodec.__file__).parent
    direct = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if "torch" in imported(path)}
    numerics = ("kernels/cpu/", "kernels/triton/", "optim/", "distributed/", "integrations/")
    assert direct
    assert {name for name in direct if not name.startswith(numerics)} == set()


@pytest.mark.parametrize("words", [["--help"], ["compress", "--help"], ["--version"]])
def test_help_imports_no_torch(words: list[str]) -> None:
    loaded = loaded_by(f"from statecodec_cli.main import main; main({words!r})")
    assert loaded.isdisjoint({"torch", "numpy", "numba", "matplotlib", "safetensors"})
    assert "statecodec_cli" in loaded
