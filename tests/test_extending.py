"""Every walk-through of docs/extending.md, performed from temporary files."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import statecodec
from statecodec import codecs
from statecodec.codecs import Codec, spec
from statecodec.errors import FormatError, UsageError
from statecodec.layouts.registry import LAYOUTS
from statecodec.operations import OPERATIONS, Operation, Option
from statecodec_cli.main import app
from statecodec_cli.verbs import remote
from tests.contracts.codec import CodecContract
from tests.contracts.layout import LayoutContract
from tests.contracts.optimizer import Make, OptimizerContract

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text("utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModuleType]]:
    """The files of the page by their last names, imported from a folder of their own as if they lay in the packages."""
    folder, modules, names = tmp_path_factory.mktemp("page"), {}, []
    for path, text in FILES.items():
        target = folder / path
        target.parent.mkdir(parents=True)
        target.write_text(text)
        name = path.removeprefix("cli/").removesuffix(".py").replace("/", ".")
        found = importlib.util.spec_from_file_location(name, target)
        assert found is not None
        assert found.loader is not None
        modules[path.removesuffix(".py")] = sys.modules[name] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules[name])
        names.append(name)
    yield modules
    for name in names:
        del sys.modules[name]


# A codec


@pytest.fixture(scope="module")
def rounded(page: dict[str, ModuleType]) -> Iterator[None]:
    spec.CODECS["rounded"] = page["statecodec/codecs/rounded"].Rounded
    yield
    del spec.CODECS["rounded"]


@pytest.mark.usefixtures("rounded")
class TestRounded(CodecContract):
    @pytest.fixture(params=["rounded", "rounded(keep=23)", "rounded(keep=1)"])
    def codec(self, request: pytest.FixtureRequest, rounded: None) -> Codec:
        return codecs.parse(request.param)


@pytest.mark.usefixtures("rounded")
def test_a_rule_takes_the_codec_into_a_file_and_back(tmp_path: Path) -> None:
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


# A layout


@pytest.fixture(scope="module")
def npy(page: dict[str, ModuleType]) -> Iterator[Any]:
    layout: Any = page["statecodec/layouts/npy"]
    LAYOUTS.append(layout)
    yield layout
    LAYOUTS.remove(layout)


class TestNpy(LayoutContract):
    @pytest.fixture(autouse=True)
    def registered(self, npy: Any) -> None:
        type(self).layout = npy

    def write(self, folder: Path) -> Any:
        array = np.arange(12.0).reshape(3, 4)
        np.save(folder / "x.npy", array)
        return torch.from_numpy(array)


@pytest.mark.usefixtures("npy")
def test_every_verb_knows_the_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    np.save(tmp_path / "w.npy", weight.numpy())
    report = statecodec.compress(tmp_path / "w.npy", tmp_path / "w.sc.safetensors", verify=True)
    assert {(t.name, t.role) for t in report.tensors if t.codec != "raw"} == {("array", "weight")}
    assert torch.allclose(statecodec.load(tmp_path / "w.sc.safetensors"), weight, rtol=2**-16)
    statecodec.restore(tmp_path / "w.sc.safetensors", tmp_path / "back.npy")
    assert np.allclose(np.load(tmp_path / "back.npy"), weight.numpy(), rtol=2**-16)
    assert statecodec.inspect(tmp_path / "w.npy").source["layout"] == "npy"


def test_without_the_layout_a_compressed_file_still_restores(npy: Any, tmp_path: Path) -> None:
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


# An optimizer


class TestSignum(OptimizerContract):
    @pytest.fixture
    def make(self, page: dict[str, ModuleType]) -> Make:
        return lambda params: page["statecodec/optim/signum"].Signum(params, lr=1e-2, dense_below=0)


def test_the_optimizer_is_signum(page: dict[str, ModuleType]) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 30).view(5, 6))
    w, m = p.detach().double(), torch.zeros(5, 6, dtype=torch.float64)
    optimizer = page["statecodec/optim/signum"].Signum([p], lr=0.1, beta=0.8, weight_decay=0.5)
    for step in range(4):
        p.grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        m = 0.8 * m + 0.2 * p.grad.double()
        w = w * (1 - 0.05) - 0.1 * m.sign()
        optimizer.step()
    assert torch.allclose(p.detach().double(), w, atol=1e-6)


# An operation


@pytest.fixture
def nonfinite(page: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Operation:
    """The page's rows."""
    row = re.search(r"^Operation\(\n.*?^\)$", PAGE, re.DOTALL | re.MULTILINE)
    assert row is not None
    operation: Operation = eval(row[0], {"Operation": Operation, "Option": Option})
    monkeypatch.setitem(OPERATIONS, "nonfinite", operation)
    monkeypatch.setitem(statecodec._HOMES, "nonfinite", "verbs.nonfinite")
    monkeypatch.setattr(statecodec, "__all__", [*statecodec.__all__, "nonfinite"])
    monkeypatch.setattr(app, "registered_commands", [*app.registered_commands])
    app.command("nonfinite")(page["cli/statecodec_cli/verbs/nonfinite"].run)
    return operation


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    torch.save({"w": torch.tensor([1.0, torch.inf, torch.nan]), "sound": torch.ones(3)}, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


@pytest.mark.usefixtures("nonfinite")
def test_the_operation_is_a_function_and_a_verb(damaged: Path) -> None:
    function: Any = statecodec.__getattr__("nonfinite")
    assert function(damaged).counts == {"w": 2}
    assert function(statecodec.compress(damaged, preset="lossless").path).counts == {"w": 2}
    assert function(damaged, role="exp_avg").counts == {}
    printed = CliRunner().invoke(app, ["nonfinite", str(damaged), "--json"])
    assert json.loads(printed.stdout)["counts"] == {"w": 2}
    assert CliRunner().invoke(app, ["nonfinite", str(damaged)]).stdout == "w: 2\n"


def test_the_service_offers_the_operation_and_carries_it_out(nonfinite: Operation, damaged: Path) -> None:
    service = pytest.importorskip("statecodec_server.operations", reason="the service's packages are not installed")
    assert service.offer(nonfinite, service.parameters("statecodec")["nonfinite"]) == nonfinite
    options = nonfinite.accepted({"role": "weight"})
    with pytest.raises(UsageError, match="nonfinite has no option 'rule'; there are role"):
        nonfinite.accepted({"rule": "x"})
    told: list[tuple[int, int, str]] = []
    call = service.OperationCall(damaged, None, damaged.parent, "ckpt.pt", options, 1, lambda *step: told.append(step))
    assert service.run(statecodec, nonfinite, call).to_json()["counts"] == {"w": 2}
    assert told[-1] == (24, 24, "counting")


@pytest.mark.usefixtures("nonfinite")
def test_remote_prints_the_report_of_an_operation_without_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    remote._show("nonfinite", {"counts": {"w": 2}}, every=False, against=False)
    assert json.loads(capsys.readouterr().out) == {"counts": {"w": 2}}
