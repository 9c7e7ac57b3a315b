"""Without its framework an integration says what to install."""

from __future__ import annotations

import importlib
import sys

import pytest

from statecodec.errors import BackendUnavailable


@pytest.mark.parametrize("framework", ["transformers", "lightning", "accelerate"])
def test_a_missing_framework_is_named(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == framework]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, framework, None)
    monkeypatch.delitem(sys.modules, f"statecodec.integrations.{framework}", raising=False)
    with pytest.raises(BackendUnavailable, match=rf"pip install 'statecodec\[{framework}\]'"):
        importlib.import_module(f"statecodec.integrations.{framework}")
