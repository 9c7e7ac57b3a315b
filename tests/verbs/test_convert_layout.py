"""`convert --layout`: held against what the other layout's own software reads."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import statecodec
from statecodec.errors import OutputExists, UsageError
from statecodec.operations import LAYOUTS
from statecodec.verbs import dcp_folder, tensors_and_json
from statecodec.verbs.convert_layout import TARGETS
from tests.contracts.layout import same

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

ANY = [layout for layout in LAYOUTS if layout != "zero-fp32"]
"""Layouts that any checkpoint can be put into."""


class Own:
    """A class that a checkpoint names, and that nobody may run."""


@pytest.fixture(scope="module")
def value() -> dict[str, Any]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 700), torch.nn.LayerNorm(700), torch.nn.Linear(700, 700))
    model[2].tied = model[2].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1, "best": math.inf, "none": None,
        "list": [torch.arange(6).view(2, 3).t(), "text", (1.5, True)], "empty": torch.empty(0, 3),
        "bf16": torch.randn(5, dtype=torch.bfloat16), "bytes": b"ab", "complex": torch.zeros(2, dtype=torch.complex64),
    }  # fmt: skip


@pytest.fixture(scope="module")
def source(value: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "ckpt.pt"
    torch.save(value, path)
    return path


def test_the_table_of_operations_has_the_same_rows() -> None:
    assert list(TARGETS) == list(LAYOUTS)


def test_to_safetensors_and_json(value: dict[str, Any], source: Path, tmp_path: Path) -> None:
    report = statecodec.convert(source, tmp_path / "a.safetensors", layout="safetensors")
    tree = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))["values"]
    with safe_open(tmp_path / "a.safetensors", "pt") as found:
        names = set(found.keys())
        assert {t.name for t in report.tensors if t.role != "skeleton"} == names

        def read(node: Any) -> Any:
            return found.get_tensor(node["tensor"])

        for name, tensor in value["model"].items():
            assert torch.equal(read(tree["model"][name]), tensor)
        for index, state in value["optimizer"]["state"].items():
            assert all(torch.equal(read(tree["optimizer"]["state"][str(index)][k]), v) for k, v in state.items())
        assert torch.equal(read(tree["list"][0]), value["list"][0])
        assert torch.equal(read(tree["bf16"]), value["bf16"])
        assert read(tree["empty"]).shape == (0, 3)
    assert tree["model"]["2.tied"] == tree["model"]["2.weight"]
    assert "model.2.tied" not in names, "one memory is stored once"
    assert tree["list"][1:] == ["text", [1.5, True]]
    assert (tree["step"], tree["none"], tree["best"]) == (1, None, {"number": "inf"})
    group, was = tree["optimizer"]["param_groups"][0], value["optimizer"]["param_groups"][0]
    assert group == json.loads(json.dumps(was))


@pytest.mark.parametrize("compressed", [False, True])
def test_to_dcp_and_back(value: dict[str, Any], source: Path, tmp_path: Path, compressed: bool) -> None:
    if compressed:
        statecodec.compress(source, tmp_path / "x.sc.safetensors", preset="lossless")
    statecodec.convert(tmp_path / "x.sc.safetensors" if compressed else source, tmp_path / "folder", layout="dcp")
    wanted = {"model": {k: torch.zeros_like(v) for k, v in value["model"].items()}, "step": 0}
    dcp.load(wanted, checkpoint_id=tmp_path / "folder", no_dist=True)
    assert same(wanted["model"], dict(value["model"]))
    assert wanted["step"] == 1
    dcp_to_torch_save(tmp_path / "folder", tmp_path / "torch.pt")
    statecodec.convert(tmp_path / "folder", tmp_path / "ours.pt", layout="torch")
    theirs, ours = (torch.load(tmp_path / name, weights_only=True) for name in ("torch.pt", "ours.pt"))
    assert same(ours, theirs)


def test_a_large_tensor_goes_to_dcp_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save of one looks at all of it; and what torch copies, it holds until the end."""
    monkeypatch.setattr(dcp_folder, "_PIECE", 5000)
    value = {
        "large": torch.randn(700, 3, 5), "half": torch.randn(4000).half(), "turned": torch.randn(90, 80).t(),
        "scalar": torch.tensor(2.0), "parameter": torch.nn.Parameter(torch.randn(1300, 2)), "small": torch.randn(3),
    }  # fmt: skip
    torch.save({"model": value, "step": 7}, tmp_path / "x.pt")
    statecodec.convert(tmp_path / "x.pt", tmp_path / "folder", layout="dcp")
    index = dcp.FileSystemReader(tmp_path / "folder").read_metadata().state_dict_metadata
    assert {name: len(index[f"model.{name}"].chunks) for name in value} == {
        "large": 9, "half": 2, "turned": 1, "scalar": 1, "parameter": 3, "small": 1
    }  # fmt: skip
    dcp_to_torch_save(tmp_path / "folder", tmp_path / "torch.pt")
    theirs = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert theirs["step"] == 7
    assert all(torch.equal(theirs["model"][name], each) for name, each in value.items())
    assert same(statecodec.load(tmp_path / "folder"), theirs)
    written = sum(p.stat().st_size for p in (tmp_path / "folder").glob("*.distcp"))
    assert written < 1.3 * (tmp_path / "x.pt").stat().st_size + 40_000, "a piece is stored with the whole behind it"


def test_to_one_torch_file_keeps_types_and_sharing(source: Path, value: dict[str, Any], tmp_path: Path) -> None:
    statecodec.compress(source, tmp_path / "x.sc.safetensors", preset="lossless")
    statecodec.convert(tmp_path / "x.sc.safetensors", tmp_path / "ours.pt", layout="torch")
    ours = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert same(ours, value)
    assert type(ours["model"]) is OrderedDict
    assert ours["model"]["2.tied"].data_ptr() == ours["model"]["2.weight"].data_ptr()


@pytest.mark.parametrize("layout", ANY)
def test_what_it_cannot_hold_is_left_out_and_named(layout: str, tmp_path: Path) -> None:
    own = Own()
    rng = numpy.random.RandomState(0).get_state()
    held = {"w": torch.ones(4), "own": own, "numpy": rng, "args": [1, {"a": own, "b": {3}}]}
    torch.save(held, tmp_path / "in.pt")
    target = tmp_path / ("out.safetensors" if layout == "safetensors" else "out")
    with pytest.raises(UsageError, match=f"{layout} cannot hold own: <opaque tests"):
        statecodec.convert(tmp_path / "in.pt", target, layout=layout, strict=True)
    assert [p.name for p in tmp_path.iterdir()] == ["in.pt"]
    report = statecodec.convert(tmp_path / "in.pt", target, layout=layout)
    left = [note for note in report.notes if note.startswith("left out:")]
    assert [note.split(": ")[1] for note in left] == ["own", "args.1.a"]
    with statecodec.open(target) as checkpoint:
        assert torch.equal(checkpoint.read("w"), held["w"])
    if layout == "safetensors":
        with safe_open(target, "pt") as found:
            assert (found.get_tensor("numpy.1").numpy() == rng[1]).all()
        assert json.loads((tmp_path / "out.json").read_text())["values"]["args"] == [1, {"b": {"set": [3]}}]


def test_what_has_no_place_in_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_and_json, "_MOST", 1000)
    torch.save({"a": {1: 2, "1": 3}}, tmp_path / "in.pt")
    with pytest.raises(UsageError, match=r"a\.1: two keys"):
        statecodec.convert(tmp_path / "in.pt", tmp_path / "out.safetensors", layout="safetensors")
    deep: Any = 1
    for _ in range(120):
        deep = [deep]
    torch.save({"deep": deep}, tmp_path / "in.pt")
    for layout in ANY:
        with pytest.raises(UsageError, match="deep"):
            statecodec.convert(tmp_path / "in.pt", tmp_path / "out", layout=layout)
    wide: Any = 1
    for _ in range(40):
        wide = [wide, wide]
    torch.save({"wide": wide}, tmp_path / "in.pt")
    with pytest.raises(UsageError, match="values"):
        statecodec.convert(tmp_path / "in.pt", tmp_path / "out.safetensors", layout="safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["in.pt"]


def test_what_is_there_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(OutputExists, match=r"a\.json"):
        statecodec.convert(source, tmp_path / "a.safetensors", layout="safetensors")
    assert (tmp_path / "a.json").read_text() == "mine"
    assert not (tmp_path / "a.safetensors").exists()
    statecodec.convert(source, tmp_path / "a.safetensors", layout="safetensors", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


@pytest.mark.parametrize("options", [{}, {"to": "torch", "layout": "dcp"}, {"layout": "zip"}, {"to": "dcp"}])
def test_one_target_is_needed(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"layout"):
        statecodec.convert(source, tmp_path / "x", **options)
