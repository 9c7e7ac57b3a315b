"""The walk-through of docs/extending.md, performed from a temporary file."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import statecodec
from statecodec.errors import FormatError
from statecodec.layouts.registry import LAYOUTS
from tests.contracts.layout import LayoutContract

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def npy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page's layout, imported from a file and registered."""
    block = re.search(r"<!-- layout: (\S+) -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert block is not None
    path = tmp_path_factory.mktemp("layout") / block.group(1)
    path.write_text(block.group(2))
    spec = importlib.util.spec_from_file_location("npy", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["npy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    LAYOUTS.append(module)  # type: ignore[arg-type]
    yield module
    LAYOUTS.remove(module)  # type: ignore[arg-type]
    del sys.modules["npy"]


class TestNpy(LayoutContract):
    @pytest.fixture(autouse=True)
    def registered(self, npy: Any) -> None:
        type(self).layout = npy

    def write(self, folder: Path) -> Any:
        array = np.arange(12.0).reshape(3, 4)
        np.save(folder / "x.npy", array)
        return torch.from_numpy(array)


def test_every_verb_knows_it(npy: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    np.save(tmp_path / "w.npy", weight.numpy())
    report = statecodec.compress(tmp_path / "w.npy", tmp_path / "w.sc.safetensors", verify=True)
    assert {(t.name, t.role) for t in report.tensors if t.codec != "raw"} == {("array", "weight")}
    assert torch.allclose(statecodec.load(tmp_path / "w.sc.safetensors"), weight, rtol=2**-16)
    statecodec.restore(tmp_path / "w.sc.safetensors", tmp_path / "back.npy")
    assert np.allclose(np.load(tmp_path / "back.npy"), weight.numpy(), rtol=2**-16)
    assert statecodec.inspect(tmp_path / "w.npy").source["layout"] == "npy"


def test_without_it_a_compressed_file_still_restores(npy: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.ones(9))
    statecodec.compress(tmp_path / "w.npy", tmp_path / "w.sc.safetensors")
    LAYOUTS.remove(npy)
    try:
        statecodec.restore(tmp_path / "w.sc.safetensors", tmp_path / "back.npy")
        with pytest.raises(FormatError, match="layout 'npy' is not known here"):
            statecodec.load(tmp_path / "w.sc.safetensors")
    finally:
        LAYOUTS.append(npy)
    assert (tmp_path / "back.npy").read_bytes() == (tmp_path / "w.npy").read_bytes()
