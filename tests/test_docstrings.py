"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import statecodec

ROOT = Path(statecodec.__file__).parent


def with_examples() -> list[str]:
    """Names of the modules with examples; found by reading, so that nothing is imported for it."""
    files = (p.relative_to(ROOT.parent).with_suffix("") for p in sorted(ROOT.rglob("*.py")) if ">>> " in p.read_text())
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


@pytest.mark.parametrize("name", with_examples())
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


def test_there_are_some() -> None:
    assert {"statecodec.names", "statecodec.optim.cast_model", "statecodec.optim.groups"} <= set(with_examples())
