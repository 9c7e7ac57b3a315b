"""The optimizer of docs/extending.md, performed from a temporary file."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.contracts.optimizer import Make, OptimizerContract

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def signum(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page's module, imported from a file."""
    block = re.search(r"<!-- optimizer: (\S+) -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert block is not None
    path = tmp_path_factory.mktemp("optimizer") / block.group(1)
    path.write_text(block.group(2))
    spec = importlib.util.spec_from_file_location("signum", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["signum"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["signum"]


class TestSignum(OptimizerContract):
    @pytest.fixture
    def make(self, signum: Any) -> Make:
        return lambda params: signum.Signum(params, lr=1e-2, dense_below=0)


def test_it_is_signum(signum: Any) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 30).view(5, 6))
    w, m = p.detach().double(), torch.zeros(5, 6, dtype=torch.float64)
    optimizer = signum.Signum([p], lr=0.1, beta=0.8, weight_decay=0.5)
    for step in range(4):
        p.grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        m = 0.8 * m + 0.2 * p.grad.double()
        w = w * (1 - 0.05) - 0.1 * m.sign()
        optimizer.step()
    assert torch.allclose(p.detach().double(), w, atol=1e-6)
