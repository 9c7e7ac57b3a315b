"""Running averages of weights: stored as their distance from the weights, wherever the two of them stand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import statecodec
from statecodec.checkpoint.open import open_checkpoint
from statecodec.choose.averages import followed
from statecodec.codecs import chunking
from statecodec.format import Reader

LR, PRESET = 1e-3, {"resume": 0.01, "small": 0.1}


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A network, two averages of it by torch's AveragedModel, and AdamW, after some steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(200, 96), nn.Linear(96, 192), nn.GELU(), nn.Linear(192, 96))
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=LR)
    slow, fast = (AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay)) for decay in (0.99, 0.9))
    for _ in range(20):
        optimizer.zero_grad()
        tokens = torch.randint(0, 180, (64,))
        nn.functional.cross_entropy(net(tokens), tokens % 50).backward()
        optimizer.step()
        slow.update_parameters(net)
        fast.update_parameters(net)
    return {
        "slow": slow.state_dict(), "model": net.state_dict(), "fast": fast.state_dict(),
        "optimizer": optimizer.state_dict(),
    }  # fmt: skip


def saved(content: dict[str, Any], path: Path) -> Path:
    torch.save(content, path)
    return path


def kinds(report: statecodec.Report) -> dict[str, str]:
    """The codecs of large weights and averages, without their fields."""
    large = [t for t in report.tensors if t.role in ("weight", "ema") and t.bytes_before >= 4 * 4096]
    return {t.name: t.codec.partition("(")[0] for t in large}


def back(report: statecodec.Report, path: Path) -> dict[str, Any]:
    statecodec.restore(report.path, path, force=True)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether all weights and averages are the same to the bit."""
    return all(torch.equal(a[key][k], b[key][k]) for key in ("slow", "model", "fast") for k in a[key])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


@pytest.mark.parametrize("preset", ["resume", "small"])
def test_averages_take_fewer_bytes_and_come_back_as_near_as_their_weights(
    preset: str, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... in whatever order, in several chunks, from a file and in memory, whole and one by one."""
    for function in (chunking.iterate, chunking.chunks):
        monkeypatch.setattr(function, "__defaults__", (5000,))
    path = saved(content, tmp_path / "x.pt")
    report = statecodec.compress(path, preset=preset, verify=True)
    with Reader(report.path) as reader:
        assert all(len(item.chunks) > 1 for item in reader.items if item.encoding.codec.name == "following")
    assert sorted(kinds(report).values()) == ["following"] * 6 + ["uniform"] * 3
    after = {t.name: t.bytes_after for t in report.tensors}
    found = back(report, tmp_path / "back.pt")
    assert equal(statecodec.load(report.path), found)
    with statecodec.open(report.path) as checkpoint:
        for key, name in (("slow", "1.weight"), ("fast", "0.weight")):
            of_weight = distance(found["model"][name], content["model"][name])
            average = content[key][f"module.{name}"]
            assert distance(found[key][f"module.{name}"], average) == pytest.approx(of_weight, rel=0.05)
            assert torch.equal(checkpoint.read(f"{key}.module.{name}"), found[key][f"module.{name}"])
            assert after[f"{key}.module.{name}"] < 0.9 * after[f"model.{name}"]


def test_a_weight_that_its_codec_refuses_takes_its_averages_along(content: dict[str, Any], tmp_path: Path) -> None:
    """NaN where no sample is taken: in a weight, beside which nothing can be stored, and in an average."""
    spoilt = copy.deepcopy(content)
    spoilt["model"]["1.weight"][190, 3] = torch.nan
    spoilt["slow"]["module.0.weight"][190, 3] = torch.nan
    report = statecodec.compress(saved(spoilt, tmp_path / "x.pt"), preset="small", verify=True)
    found = kinds(report)
    assert (found["model.1.weight"], found["slow.module.1.weight"], found["fast.module.1.weight"]) == (
        "raw", "uniform", "uniform",
    )  # fmt: skip
    assert (found["model.0.weight"], found["slow.module.0.weight"], found["fast.module.0.weight"]) == (
        "uniform", "raw", "following",
    )  # fmt: skip
    exact = {note.partition(":")[0] for note in report.notes if "kept exact" in note}
    assert exact == {"model.1.weight", "slow.module.0.weight"}
    assert {note.partition(":")[0] for note in report.notes if ": stored as uniform: " in note} == {
        "slow.module.1.weight", "fast.module.1.weight",
    }  # fmt: skip
    restored = back(report, tmp_path / "back.pt")
    assert restored["slow"]["module.0.weight"].isnan().sum() == restored["model"]["1.weight"].isnan().sum() == 1


def test_an_average_that_has_not_moved_takes_nothing(content: dict[str, Any], tmp_path: Path) -> None:
    equal_ones = {**content, "slow": {f"module.{k}": w.clone() for k, w in content["model"].items()}}
    equal_ones["slow"]["n_averaged"] = torch.tensor(1)
    report = statecodec.compress(saved(equal_ones, tmp_path / "x.pt"))
    assert kinds(report)["slow.module.1.weight"] == "following"
    assert {t.name: t.bytes_after for t in report.tensors}["slow.module.1.weight"] < 400
    found = back(report, tmp_path / "back.pt")
    same = found["slow"]["module.1.weight"] == found["model"]["1.weight"]
    assert same.float().mean() > 0.99, "but for what lies in the middle between two"


def test_sixteen_bit_averages_are_exact_beside_their_weights(content: dict[str, Any], tmp_path: Path) -> None:
    halves = copy.deepcopy(content)
    for key in ("slow", "fast", "model"):
        halves[key] = {k: t.bfloat16() if t.is_floating_point() else t for k, t in halves[key].items()}
    path = saved(halves, tmp_path / "x.pt")
    for preset in ("lossless", "tiny"):
        report = statecodec.compress(path, preset=preset, verify=True, force=True)
        found = {name: kind for name, kind in kinds(report).items() if not name.startswith("slow")}
        assert set(found.values()) == {"raw", "ulps"}
        assert all((kind == "ulps") == name.startswith("fast") for name, kind in found.items())
        assert equal(back(report, tmp_path / "back.pt"), halves)


def test_shares_and_conversions(content: dict[str, Any], tmp_path: Path) -> None:
    path = saved(content, tmp_path / "x.pt")
    whole = statecodec.compress(path, tmp_path / "whole.sc.safetensors")
    for number in (2, 1):
        statecodec.compress_share(path, tmp_path / "joined.sc.safetensors", share=f"{number}/2")
    joined = statecodec.finalize(path, tmp_path / "joined.sc.safetensors")
    assert Path(joined.path).read_bytes() == Path(whole.path).read_bytes()

    kept = statecodec.convert(whole.path, tmp_path / "kept.sc.safetensors", to=["exp_avg=companded"])
    assert set(kinds(kept).values()) == {"following", "uniform"}
    other = statecodec.convert(whole.path, tmp_path / "other.sc.safetensors", to=["weight:fp32,numel>=4096=raw"])
    assert set(kinds(other).values()) == {"raw"}, "rules for weights are for their copies too"
    expected = back(whole, tmp_path / "a.pt")
    for report in (kept, other):
        assert equal(back(report, tmp_path / "b.pt"), expected)


def test_a_link_has_averages_as_the_smaller_of_distance_and_change(content: dict[str, Any], tmp_path: Path) -> None:
    """One that has hardly moved since the base, and one that has moved as far as its weights."""
    base = statecodec.compress(saved(content, tmp_path / "base.pt"))
    moved = copy.deepcopy(content)
    for name, weight in moved["model"].items():
        weight += LR * torch.randn_like(weight)
        moved["slow"][f"module.{name}"] += 1e-5
        moved["fast"][f"module.{name}"] = weight + 1e-5
    path = saved(moved, tmp_path / "x.pt")
    alone = statecodec.compress(path, tmp_path / "alone.sc.safetensors")
    link = statecodec.compress(path, tmp_path / "link.sc.safetensors", base=base.path, verify=True)
    found = kinds(link)
    assert {found[name] for name in found if name.startswith("slow")} == {"delta"}
    assert {found[name] for name in found if name.startswith("fast")} == {"following"}
    before, after = ({t.name: t.bytes_after for t in report.tensors} for report in (alone, link))
    assert all(after[name] < 0.5 * before[name] for name in found if name.startswith("slow"))

    expected, linked = back(alone, tmp_path / "a.pt"), back(link, tmp_path / "b.pt")
    assert all(torch.equal(expected["model"][name], linked["model"][name]) for name in moved["model"])
    for name in ("0.weight", "1.weight", "3.weight"):
        of_weight = distance(linked["model"][name], moved["model"][name])
        assert distance(linked["slow"][f"module.{name}"], moved["slow"][f"module.{name}"]) <= 1.05 * of_weight
    converted = statecodec.convert(link.path, tmp_path / "c.sc.safetensors", to=["exp_avg=companded"])
    assert {kind for name, kind in kinds(converted).items() if not name.startswith("fast")} == {"uniform"}
    assert equal(back(converted, tmp_path / "c.pt"), linked)

    compared = statecodec.diff(path, link.path)
    told = {t.name: t.error["step_error"] for t in link.tensors if t.error and "step_error" in t.error}
    errors = {t.name: t.step_error for t in compared.tensors if t.step_error}
    assert compared.total["weight_step_error"] == pytest.approx(link.total["weight_step_error"], rel=0.01)  # type: ignore[index]
    for name in ("model.1.weight", "slow.module.1.weight", "fast.module.3.weight"):
        assert errors[name] == pytest.approx(told[name], rel=1e-3)


def test_averages_without_names_follow_the_nearest_weight_of_their_shape(tmp_path: Path) -> None:
    """As diffusers keeps them, in a file of their own; one of them is near none."""
    torch.manual_seed(1)
    weights = [nn.Parameter(0.02 * torch.randn(80, 60)) for _ in range(4)]
    optimizer = torch.optim.AdamW(weights, lr=LR)
    for w in weights:
        w.grad = torch.randn_like(w)
    optimizer.step()
    shadows = [w.detach() + 1e-3 * torch.randn(80, 60) for w in reversed(weights)]
    shadows[2] = 0.02 * torch.randn(80, 60)
    model = {f"{i}.weight": w.detach() for i, w in enumerate(weights)}
    (tmp_path / "run").mkdir()
    saved({"model": model, "optimizer": optimizer.state_dict()}, tmp_path / "run" / "model.pt")
    saved({"shadow_params": shadows}, tmp_path / "run" / "ema.pt")
    report = statecodec.compress(tmp_path / "run", tmp_path / "x.sc.safetensors", verify=True)
    own = [f"ema.pt:shadow_params.{i}" for i in range(4)]
    for path in (tmp_path / "run", report.path):
        with open_checkpoint(path) as checkpoint:
            found = {
                name.rpartition(".")[2]: weight.rpartition(":")[2] for name, weight in followed(checkpoint).items()
            }
        assert found == {"0": "model.3.weight", "1": "model.2.weight", "3": "model.0.weight"}
    own = [f"ema.pt:shadow_params.{i}" for i in range(4)]
    assert [kinds(report)[name] for name in own] == ["following", "following", "raw", "following"]
    errors = {t.name: t.error["step_error"] for t in report.tensors if t.error and "step_error" in t.error}
    told = {name: pytest.approx(errors[name], rel=0.02) for name in own if name in errors}
    assert len(told) == 3
    for sides in ((tmp_path / "run", report.path), (report.path, tmp_path / "run")):
        assert {t.name: t.step_error for t in statecodec.diff(*sides).tensors if t.name in own and t.step_error} == told


def test_a_rule_cannot_name_a_codec_whose_weight_it_does_not(content: dict[str, Any], tmp_path: Path) -> None:
    report = statecodec.compress(saved(content, tmp_path / "x.pt"), rules=["ema=following(step=1e-06)"])
    assert any("no weight is known to belong to it" in note for note in report.notes)
    unpacked = statecodec.compress(tmp_path / "x.pt", pack="none", force=True)
    assert set(kinds(unpacked).values()) == {"uniform"}, "a file that is mapped holds every tensor"
