"""`convert --layout zero-fp32`, held against what DeepSpeed's zero_to_fp32.py made of the same files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec.errors import UsageError

DATA = Path(__file__).parents[1] / "layouts" / "data" / "deepspeed.zip"
FROZEN = {"frozen.weight", "frozen.bias"}


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See tests/layouts/save_zero.py."""
    folder = tmp_path_factory.mktemp("deepspeed")
    shutil.unpack_archive(DATA, folder)
    return folder


@pytest.mark.parametrize("inside", ["", "global_step3"])
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_it_is_what_deepspeed_makes(name: str, inside: str, deepspeed: Path, tmp_path: Path) -> None:
    source = deepspeed / name / inside
    if name == "zero3":  # a compressed one is as good
        statecodec.compress(source, tmp_path / "x.sc.safetensors", preset="lossless")
        source = tmp_path / "x.sc.safetensors"
    statecodec.convert(source, tmp_path / "fp32.pt", layout="zero-fp32")
    expected, found = torch.load(deepspeed / f"{name}.pt"), torch.load(tmp_path / "fp32.pt")
    assert set(found) == set(expected) | FROZEN  # DeepSpeed leaves the frozen ones of stage 1 out
    for key, value in expected.items():
        assert torch.equal(found[key], value.float()), key
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert found["head.weight"].data_ptr() == found["emb.weight"].data_ptr()


def test_the_step_is_the_latest_and_must_be_certain(deepspeed: Path, tmp_path: Path) -> None:
    shutil.copytree(deepspeed / "zero2", tmp_path / "run")
    shutil.copytree(deepspeed / "zero3" / "global_step3", tmp_path / "run" / "global_step2")
    statecodec.convert(tmp_path / "run", tmp_path / "fp32.pt", layout="zero-fp32")
    assert torch.equal(torch.load(tmp_path / "fp32.pt")["fc.weight"], torch.load(deepspeed / "zero2.pt")["fc.weight"])
    (tmp_path / "run" / "latest").write_text("global_step7")
    with pytest.raises(UsageError, match="2 checkpoints, none of which `latest` names"):
        statecodec.convert(tmp_path / "run", tmp_path / "other.pt", layout="zero-fp32")


def test_others_are_refused(deepspeed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint of DeepSpeed's ZeRO"):
        statecodec.convert(deepspeed / "zero2.pt", tmp_path / "fp32.pt", layout="zero-fp32")
    assert not (tmp_path / "fp32.pt").exists()
