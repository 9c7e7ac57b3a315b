"""What FSDP1 saves of a model on two ranks: shards have the names of their parameters, flat parameters none."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec.layouts import locate
from tests.layouts.save_dcp import Net
from tests.layouts.support import zip_of

NAMES = {name for name, _ in Net(64).named_parameters()}


def test_a_rank_s_shards_have_the_names_of_their_parameters(dcp_sharded: Path) -> None:
    for rank in range(2):
        source = locate(dcp_sharded / "fsdp1" / f"sharded_{rank}.pt")
        weights = {t.param: t for t in source.tensors if t.role == "weight"}
        assert set(weights) == NAMES
        assert {m.param: m.weight for m in source.moments} == {name: t.name for name, t in weights.items()}
        shapes = {t.param: t.shape for t in source.tensors if t.role == "exp_avg"}
        assert shapes == {name: t.shape for name, t in weights.items()}
        assert weights["fc.weight"].shape == (96, 64)  # half of it


def test_flat_parameters_are_named_as_such(dcp_sharded: Path) -> None:
    path = dcp_sharded / "fsdp1" / "local_0.pt"
    source = locate(path)
    assert source.framework == "FSDP1, flat parameters"
    assert {t.param for t in source.tensors if t.role == "weight"} == {"_flat_param", "fc._flat_param"}
    assert {m.param: m.weight for m in source.moments} == dict.fromkeys(NAMES)


def test_the_model_in_one_folder_and_its_optimizer_in_another(dcp_sharded: Path, tmp_path: Path) -> None:
    folder = dcp_sharded / "fsdp1" / "state"
    source = locate(folder)
    assert "FSDP, sharded state dict" in str(source.framework)
    weights = {t.param: t.name for t in source.tensors if t.role == "weight"}
    assert set(weights) == NAMES
    assert {m.param: m.weight for m in source.moments} == weights
    report = statecodec.compress(folder, tmp_path / "x.sc.safetensors")
    assert {t.param for t in report.tensors if t.codec.startswith("uniform") and t.role == "weight"} >= {"fc.weight"}


@pytest.mark.parametrize("kind", ["sharded", "local"])
def test_they_come_back_to_the_bit(dcp_sharded: Path, kind: str, tmp_path: Path) -> None:
    path = dcp_sharded / "fsdp1" / f"{kind}_0.pt"
    statecodec.compress(path, tmp_path / "x.sc.safetensors", preset="lossless")
    statecodec.restore(tmp_path / "x.sc.safetensors", tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == path.read_bytes()


def test_windows_that_differ_name_no_tensor(tmp_path: Path) -> None:
    """FSDP1 with original parameters saves a flat parameter, and those in it, of one storage."""
    flat = torch.arange(40.0)
    torch.save({"model": {"a.weight": flat[:32].view(4, 8), "a.bias": flat[32:], "a.flat": flat}}, tmp_path / "x.pt")
    (tensor,) = locate(tmp_path / "x.pt").tensors
    assert (tensor.shape, tensor.role, tensor.param) == ((40,), "weight", None)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"ShardedTensor\n", b"ShardedTensoq\n"), (b"X\x06\x00\x00\x00tensor", b"X\x06\x00\x00\x00tenzor")],
    ids=["class", "slot"],
)
def test_a_sharded_tensor_of_another_form_is_left_alone(
    old: bytes, new: bytes, dcp_sharded: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(dcp_sharded / "fsdp1" / "sharded_0.pt") as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    storages = {name.removeprefix("data/"): data for name, data in entries.items() if name.startswith("data/")}
    assert old in entries["data.pkl"]
    (tmp_path / "x.pt").write_bytes(zip_of(entries["data.pkl"].replace(old, new), storages))
    found = locate(tmp_path / "x.pt")
    assert found.tensors
    assert not [t for t in found.tensors if t.role == "weight"]
