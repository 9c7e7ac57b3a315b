"""The codec of docs/extending.md, performed from a temporary file."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec import codecs
from statecodec.codecs import Codec, spec
from tests.contracts.codec import CodecContract

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module", autouse=True)
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's module, imported from a file, and its row in the registry."""
    block = re.search(r"<!-- codec: (\S+) -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert block is not None
    path = tmp_path_factory.mktemp("codec") / block.group(1)
    path.write_text(block.group(2))
    found = importlib.util.spec_from_file_location("rounded", path)
    assert found is not None
    assert found.loader is not None
    module = sys.modules["rounded"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    spec.CODECS["rounded"] = module.Rounded
    yield
    del spec.CODECS["rounded"], sys.modules["rounded"]


class TestRounded(CodecContract):
    @pytest.fixture(params=["rounded", "rounded(keep=23)", "rounded(keep=1)"])
    def codec(self, request: pytest.FixtureRequest) -> Codec:
        return codecs.parse(request.param)


def test_a_rule_takes_it_into_a_file_and_back(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    torch.save({"w": weight}, path)
    report = statecodec.compress(path, rules=["w=rounded(keep=10)"], verify=True)
    assert {t.name: t.codec for t in report.tensors}["w"] == "rounded(keep=10)"
    assert report.bytes < 0.75 * path.stat().st_size
    statecodec.restore(report.path, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["w"]
    assert ((back - weight).abs() <= weight.abs() * 2.0**-11).all()
    assert not torch.equal(back, weight)
