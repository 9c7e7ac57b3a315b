"""bf16 weights beside their fp32 masters: stored once, and restored bit for bit whatever becomes of the masters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.codecs import Raw

SHAPE = (300, 128)  # samples are the first 2^14 elements and as many in the middle


def mixed(dtype: torch.dtype = torch.bfloat16, steps: int = 30) -> dict[str, Any]:
    """Masters in the optimizer's state, trained by torch's AdamW; the model's weights are their rounded copies."""
    torch.manual_seed(0)
    masters = {name: torch.nn.Parameter(0.02 * torch.randn(SHAPE)) for name in ("a.weight", "b.weight", "c.weight")}
    optimizer = torch.optim.AdamW(list(masters.values()), lr=1e-3)
    for _ in range(steps):
        for p in masters.values():
            p.grad = torch.randn_like(p) + p.detach()
        optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["param_names"] = list(masters)
    for i, p in enumerate(masters.values()):
        state["state"][i]["master_param"] = p.detach().clone()
    return {"optimizer": state, "model": {name: p.detach().to(dtype) for name, p in masters.items()}}


def weights(content: dict[str, Any]) -> list[torch.Tensor]:
    return [w.view(torch.int16) for w in content["model"].values()]


@pytest.mark.parametrize(
    ("preset", "dtype", "share"),
    [
        ("lossless", torch.bfloat16, 0.01),
        ("lossless", torch.float16, 0.01),
        ("resume", torch.bfloat16, 0.1),
        ("small", torch.bfloat16, 0.3),
        ("tiny", torch.bfloat16, 0.5),
        ("resume", torch.float16, 0.4),
    ],
)
def test_weights_are_stored_once_and_come_back_bit_for_bit(
    preset: str, dtype: torch.dtype, share: float, tmp_path: Path
) -> None:
    content = mixed(dtype)
    torch.save(content, tmp_path / "x.pt")
    report = statecodec.compress(tmp_path / "x.pt", preset=preset, verify=True)
    sizes = {t.name: (t.codec, t.bytes_after, t.bytes_before) for t in report.tensors}
    for name in content["model"]:
        codec, after, before = sizes[f"model.{name}"]
        assert codec == "ulps"
        assert after < share * before
    masters = {t.codec.partition("(")[0] for t in report.tensors if t.role == "master"}
    if preset != "lossless":
        assert report.total is not None
        assert report.total["weight_step_error"] == pytest.approx(report.asked["weight_step_error"], rel=0.02)
    assert masters == ({"raw"} if preset == "lossless" else {"uniform"}), "the step that trains them is known"
    statecodec.restore(report.path, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt")
    assert all(map(torch.equal, weights(back), weights(content)))
    assert all(map(torch.equal, weights(statecodec.load(report.path)), weights(content)))
    if preset == "lossless":
        assert (tmp_path / "back.pt").read_bytes() == (tmp_path / "x.pt").read_bytes()


def test_weights_that_do_not_follow_are_stored(tmp_path: Path) -> None:
    """One is another tensor altogether; one holds NaN where its master does not, found while it is encoded."""
    content = mixed()
    content["model"]["a.weight"] = content["model"]["a.weight"].flip(0)
    content["model"]["b.weight"][250, :] = torch.nan
    content["model"]["c.weight"][250, :] = 7.0
    torch.save(content, tmp_path / "x.pt")
    report = statecodec.compress(tmp_path / "x.pt", verify=True)
    codec = {t.name: t.codec for t in report.tensors}
    assert [codec[f"model.{n}.weight"] for n in "abc"] == ["raw", "raw", "ulps"]
    statecodec.restore(report.path, tmp_path / "back.pt")
    assert all(map(torch.equal, weights(torch.load(tmp_path / "back.pt")), weights(content)))


@pytest.mark.parametrize("masters_first", [True, False])
def test_a_master_that_its_codec_refuses_takes_its_weights_along(masters_first: bool, tmp_path: Path) -> None:
    """An infinity where no sample is taken: the master is stored exactly, the weight beside that or on its own."""
    content = mixed()
    state = content["optimizer"]["state"][1]
    state["master_param"][290, 3] = torch.inf
    content["model"]["b.weight"][290, 3] = torch.inf
    if not masters_first:
        content = {"model": content["model"], "optimizer": content["optimizer"]}
    torch.save(content, tmp_path / "x.pt")
    report = statecodec.compress(tmp_path / "x.pt", preset="tiny", verify=True)
    codec = {t.name: t.codec for t in report.tensors}
    assert codec["optimizer.state.1.master_param"] == "raw"
    assert codec["model.a.weight"] == "ulps"
    assert codec["model.b.weight"] == "ulps" if masters_first else "raw"
    assert all(map(torch.equal, weights(statecodec.load(report.path)), weights(content)))


def test_rules_of_your_own_and_unpacked_files_are_left_alone(tmp_path: Path) -> None:
    torch.save(mixed(), tmp_path / "x.pt")
    own = statecodec.compress(tmp_path / "x.pt", rules=["a.weight=raw", "master=companded"], force=True)
    codec = {t.name: t.codec for t in own.tensors}
    assert codec["model.a.weight"] == codec["model.b.weight"] == "raw", "groups of a row do not fit pieces of one"
    unpacked = statecodec.compress(tmp_path / "x.pt", pack="none", force=True)
    assert not [t for t in unpacked.tensors if t.codec == "ulps"]


def test_conversions_keep_the_weights(tmp_path: Path) -> None:
    content = mixed()
    torch.save(content, tmp_path / "x.pt")
    packed = statecodec.compress(tmp_path / "x.pt").path
    copied = statecodec.convert(packed, tmp_path / "y.sc.safetensors", to=["exp_avg=companded"])
    assert [t.codec for t in copied.tensors if t.name.startswith("model.")] == ["ulps"] * 3
    moved = statecodec.convert(packed, tmp_path / "z.sc.safetensors", to=["master=companded"])
    assert [t.codec for t in moved.tensors if t.name.startswith("model.")] == ["raw"] * 3
    for path in (copied.path, moved.path):
        assert all(map(torch.equal, weights(statecodec.load(path)), weights(content)))


def test_an_open_file_gives_weights_and_their_names(tmp_path: Path) -> None:
    content = mixed()
    torch.save(content, tmp_path / "x.pt")
    with statecodec.open(statecodec.compress(tmp_path / "x.pt").path) as checkpoint:
        assert isinstance(checkpoint, StoredCheckpoint)
        assert torch.equal(checkpoint.read("model.a.weight"), content["model"]["a.weight"])
        assert checkpoint.read_encoded("model.a.weight").codec == Raw()
        assert checkpoint.info("model.a.weight")["param"] == "a.weight"
    with SourceCheckpoint(tmp_path / "x.pt") as source:
        pairs = {m.param: m.weight for m in source.moments}
    assert pairs["a.weight"] == "optimizer.state.0.master_param"
