"""Tensors that are there twice are stored once, and come back under both names whatever becomes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec import codecs
from statecodec.choose.choices import Choice
from statecodec.choose.copies import _is_alike


def trained(seed: int = 0, widths: tuple[int, int] = (96, 80)) -> dict[str, Any]:
    """A model and its AdamW after a few steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(*widths), torch.nn.Linear(widths[1], 96))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    for _ in range(3):
        model(torch.randn(16, 96)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def codecs_of(report: statecodec.Report) -> dict[str, str]:
    return {t.name: t.codec.partition("(")[0] for t in report.tensors}


def test_an_average_that_has_not_moved_costs_nothing(tmp_path: Path) -> None:
    content = trained()
    content["model_ema"] = {key: value.clone() for key, value in content["model"].items()}
    torch.save(content, tmp_path / "x.pt")
    report = statecodec.compress(tmp_path / "x.pt", preset="lossless", verify=True)
    copies = [t for t in report.tensors if t.name.startswith("model_ema") and t.name.endswith("weight")]
    assert [(t.codec, t.bytes_after < 100) for t in copies] == [("same", True)] * 2
    with statecodec.open(report.path) as checkpoint:
        assert torch.equal(checkpoint.read("model_ema.0.weight"), content["model"]["0.weight"])
    loaded = statecodec.load(report.path)
    assert all(torch.equal(loaded["model_ema"][key], value) for key, value in content["model"].items())
    loaded["model_ema"]["0.weight"].zero_()
    assert loaded["model"]["0.weight"].any(), "two tensors, not one"
    statecodec.restore(report.path, tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == (tmp_path / "x.pt").read_bytes()


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    """A directory with the same checkpoint under two names, as two files."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(trained(), folder / "best.pt")
    shutil.copy(folder / "best.pt", folder / "last.pt")
    return folder


@pytest.mark.parametrize("preset", ["lossless", "resume", "tiny"])
def test_two_equal_files_are_stored_once(preset: str, twice: Path, tmp_path: Path) -> None:
    report = statecodec.compress(twice, preset=preset, verify=True)
    one = statecodec.compress(twice / "best.pt", tmp_path / "one.sc.safetensors", preset=preset)
    assert report.bytes < one.bytes + 6000
    large = [t for t in report.tensors if t.name.startswith("last") and t.bytes_before >= 4096]
    assert {(t.codec, t.bytes_after < 100) for t in large} == {("same", True)}
    errors = {t.name: t.error for t in report.tensors}
    for name, error in errors.items():
        if name.startswith("best.pt:") and error:
            assert errors[name.replace("best", "last", 1)] == error
    statecodec.restore(report.path, tmp_path / "back")
    best, last = ((tmp_path / "back" / name).read_bytes() for name in ("best.pt", "last.pt"))
    assert best == last
    assert (best == (twice / "best.pt").read_bytes()) is (preset == "lossless")
    statecodec.restore(one.path, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").read_bytes() == best, "the same numbers as of one file alone"
    assert statecodec.verify(report.path, against=twice).tensors


@pytest.mark.parametrize("second", ["a_head", "z_head"])
def test_a_tied_weight_under_its_second_name_costs_nothing(second: str, tmp_path: Path) -> None:
    """As DCP and several files hold it; whichever name comes first, and though one of them alone has moments."""
    content = trained()
    tied = content["model"]["0.weight"]
    frozen = torch.randn(96, 80)
    content["model"] = dict(sorted({**content["model"], second: tied.clone(), "frozen": frozen}.items()))
    torch.save(content, tmp_path / "x.pt")
    report = statecodec.compress(tmp_path / "x.pt", verify=True)
    found = codecs_of(report)
    assert [found[f"model.{name}"] for name in ("0.weight", second, "frozen")] == ["uniform", "same", "raw"]
    back = statecodec.load(report.path)["model"]
    assert torch.equal(back[second], back["0.weight"])
    assert not torch.equal(back[second], tied)
    exact = statecodec.compress(tmp_path / "x.pt", rules=[f"*{second}=raw"], force=True)
    assert torch.equal(statecodec.load(exact.path)["model"][second], tied), "a rule of one's own is kept"
    tied.view(-1)[1000] += 1e-3
    torch.save(content, tmp_path / "x.pt")
    other = statecodec.compress(tmp_path / "x.pt", force=True)
    assert codecs_of(other)[f"model.{second}"] == "raw", "it is another tensor after all"


@pytest.mark.parametrize("preset", ["resume", "small", "tiny", "live", "weights"])
def test_a_copy_that_is_exact_makes_the_original_exact(preset: str, tmp_path: Path) -> None:
    """A lossy tensor and an exact one would be larger than the exact one alone."""
    content = trained()
    content["backup"] = {"of nobody knows what": content["model"]["0.weight"].clone(), "n": 3}
    content["old"] = {"exp_avg_sq of before": content["optimizer"]["state"][0]["exp_avg_sq"].clone(), "n": 3}
    torch.save(content, tmp_path / "x.pt")
    report = statecodec.compress(tmp_path / "x.pt", preset=preset, pack="zstd", verify=True)
    assert codecs_of(report)["backup.of nobody knows what"] == "same"
    back = statecodec.load(report.path)
    for copy, original in (
        (back["backup"]["of nobody knows what"], content["model"]["0.weight"]),
        (back["model"]["0.weight"], content["model"]["0.weight"]),
        (back["old"]["exp_avg_sq of before"], content["optimizer"]["state"][0]["exp_avg_sq"]),
    ):
        assert torch.equal(copy, original)
    assert back["optimizer"]["state"][0]["exp_avg_sq"].any() == (preset != "weights")
    exact = statecodec.compress(tmp_path / "x.pt", tmp_path / "exact.sc.safetensors", preset="lossless")
    assert report.bytes < exact.bytes
    for number in (1, 2, 3):
        share = f"{number}/3"
        statecodec.compress_share(tmp_path / "x.pt", tmp_path / "j.sc.safetensors", share=share, preset=preset)
    joined = statecodec.finalize(tmp_path / "x.pt", tmp_path / "j.sc.safetensors")
    assert Path(joined.path).read_bytes() == Path(report.path).read_bytes()


@pytest.mark.parametrize("preset", ["resume", "tiny"])
def test_the_average_of_asgd_is_the_weight_as_long_as_averaging_has_not_begun(preset: str, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(96, 80), torch.nn.Linear(80, 96))
    optimizer = torch.optim.ASGD(model.parameters())
    model(torch.randn(16, 96)).square().mean().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    exact = statecodec.compress(tmp_path / "x.pt", tmp_path / "exact.sc.safetensors", preset="lossless")
    report = statecodec.compress(tmp_path / "x.pt", preset=preset, verify=True)
    roles = {t.name: t.role for t in report.tensors}
    assert (roles["model.0.weight"], roles["optimizer.state.0.ax"]) == ("weight", "ema")
    assert codecs_of(report)["optimizer.state.0.ax"] == "same"
    assert report.bytes <= exact.bytes * 1.002


@pytest.mark.parametrize("names", [("model", "model_ema"), ("model_ema", "model")])
def test_a_weight_that_is_its_own_average_is_a_weight(names: tuple[str, str], tmp_path: Path) -> None:
    """Two tensors on one memory, as `state_dict()` called twice gives them."""
    content = trained()
    saved = {name: {key: value.detach() for key, value in content["model"].items()} for name in names}
    torch.save({**saved, "optimizer": content["optimizer"]}, tmp_path / "x.pt")
    report = statecodec.compress(tmp_path / "x.pt", verify=True)
    (weight,) = (t for t in report.tensors if t.name.endswith(".0.weight"))
    assert (weight.role, weight.codec.partition("(")[0]) == ("weight", "uniform")


def test_what_differs_where_no_sample_is_taken_is_stored_itself(twice: Path, tmp_path: Path) -> None:
    for key, change in (("0.weight", 1.0), ("1.weight", -0.0)):
        content = torch.load(twice / "last.pt")
        content["model"][key].view(-1)[1000] = change
        torch.save(content, twice / "last.pt")
        report = statecodec.compress(twice, verify=True, preset="lossless", force=True)
        assert codecs_of(report)[f"last.pt:model.{key}"] == "raw"
        statecodec.restore(report.path, tmp_path / key)
        assert (tmp_path / key / "last.pt").read_bytes() == (twice / "last.pt").read_bytes()


def test_a_copy_that_has_to_be_exact_does_not_follow_a_lossy_one(twice: Path) -> None:
    report = statecodec.compress(twice, rules=["last*weight=raw"], verify=True)
    found = codecs_of(report)
    assert found["best.pt:model.0.weight"] != "raw"
    assert found["last.pt:model.0.weight"] == "raw"
    back = statecodec.load(report.path)
    assert torch.equal(back["last.pt"]["model"]["0.weight"], torch.load(twice / "last.pt")["model"]["0.weight"])


def test_a_copy_of_what_its_codec_refuses(twice: Path, tmp_path: Path) -> None:
    """NaN where no sample is taken: the original is stored exactly after all, and its copy follows."""
    content = torch.load(twice / "best.pt")
    content["model"]["0.weight"].view(-1)[1000] = torch.nan
    for name in ("best.pt", "last.pt"):
        torch.save(content, twice / name)
    report = statecodec.compress(twice, preset="tiny", verify=True)
    found = codecs_of(report)
    assert (found["best.pt:model.0.weight"], found["last.pt:model.0.weight"]) == ("raw", "same")


def test_unpacked_files_hold_every_tensor(twice: Path) -> None:
    assert "same" not in codecs_of(statecodec.compress(twice, pack="none")).values()


def test_shares_make_the_same_file(twice: Path, tmp_path: Path) -> None:
    whole = statecodec.compress(twice, tmp_path / "whole.sc.safetensors")
    for number in (1, 2, 3):
        statecodec.compress_share(twice, tmp_path / "joined.sc.safetensors", share=f"{number}/3")
    joined = statecodec.finalize(twice, tmp_path / "joined.sc.safetensors")
    assert Path(joined.path).read_bytes() == Path(whole.path).read_bytes()


def test_conversions(twice: Path, tmp_path: Path) -> None:
    packed = statecodec.compress(twice).path
    copied = statecodec.convert(packed, tmp_path / "a.sc.safetensors", to=["exp_avg_sq=companded(curve=log)"])
    found = codecs_of(copied)
    assert found["last.pt:model.0.weight"] == "same"
    dense = statecodec.convert(packed, tmp_path / "b.sc.safetensors", to=["*=raw"])
    assert {t.codec for t in dense.tensors if t.role not in ("skeleton", "file")} == {"raw"}
    first, second = statecodec.load(packed), statecodec.load(dense.path)
    for name in ("best.pt", "last.pt"):
        assert torch.equal(first[name]["model"]["0.weight"], second[name]["model"]["0.weight"])


def test_links_of_a_chain(twice: Path, tmp_path: Path) -> None:
    base = statecodec.compress(twice, tmp_path / "0.sc.safetensors")
    for name in ("best.pt", "last.pt"):
        content = torch.load(twice / name)
        content["model"]["0.weight"] += 1e-3
        torch.save(content, twice / name)
    link = statecodec.compress(twice, tmp_path / "1.sc.safetensors", base=base.path, verify=True)
    assert codecs_of(link)["last.pt:model.0.weight"] == "same"
    torch.save(trained(1), twice / "last.pt")
    other = statecodec.compress(twice, tmp_path / "2.sc.safetensors", base=link.path, verify=True)
    assert codecs_of(other)["last.pt:model.0.weight"] != "same"


def test_a_second_moment_that_another_tensor_is_decoded_beside_stands_by_itself(tmp_path: Path) -> None:
    """Two parameters of equal second moments and different first ones: `direction` needs one that is no copy."""
    content = trained(widths=(96, 96))
    states = content["optimizer"]["state"]
    states[2]["exp_avg_sq"] = states[0]["exp_avg_sq"].clone()
    torch.save(content, tmp_path / "x.pt")
    report = statecodec.compress(tmp_path / "x.pt", verify=True)
    found = codecs_of(report)
    assert found["optimizer.state.0.exp_avg"] == found["optimizer.state.2.exp_avg"] == "direction"
    assert found["optimizer.state.0.exp_avg_sq"] == found["optimizer.state.2.exp_avg_sq"] == "logarithmic"


def test_what_is_decoded_beside_other_tensors_is_no_copy() -> None:
    own = Choice(codecs.Encoding(codecs.Direction(step=0.01)), "", companions={"exp_avg_sq": "b"})
    first = Choice(codecs.Encoding(codecs.Direction(step=0.01)), "", companions={"exp_avg_sq": "a"})
    assert not _is_alike(own, first, (96, 80), {})
    assert _is_alike(own, first, (96, 80), {"b": "a"})


@pytest.mark.parametrize("preset", ["lossless", "resume"])
def test_low_halves_that_are_zero_cost_next_to_nothing(preset: str, tmp_path: Path) -> None:
    """A frozen base that was loaded from bf16: in fp32 it takes what the bf16 weights would, and comes back exact."""
    torch.manual_seed(0)
    narrow = (torch.randn(128, 512) * 0.02).bfloat16()
    sizes = []
    for base in (narrow, narrow.float()):
        content = trained()
        content["model"]["base.weight"] = base
        torch.save(content, tmp_path / "x.pt")
        report = statecodec.compress(tmp_path / "x.pt", preset=preset, force=True)
        sizes += [t.bytes_after for t in report.tensors if t.name == "model.base.weight"]
        assert torch.equal(statecodec.load(report.path)["model"]["base.weight"], base)
    assert sizes[1] < 1.1 * sizes[0]


def test_a_file_that_is_there_twice_is_stored_once(tmp_path: Path) -> None:
    """Whatever is in it: two names of one checkpoint, and two of a file that is none."""
    (tmp_path / "run").mkdir()
    torch.save({"w": torch.randn(64, 64)}, tmp_path / "run" / "best.pt")
    (tmp_path / "run" / "data.bin").write_bytes(torch.randn(5000).numpy().tobytes())
    for name, copy in (("best.pt", "last.pt"), ("data.bin", "data-2.bin")):
        (tmp_path / "run" / copy).write_bytes((tmp_path / "run" / name).read_bytes())
    report = statecodec.compress(tmp_path / "run", tmp_path / "x.sc.safetensors", preset="lossless")
    found = {t.name: t for t in report.tensors}
    pairs = (found["data-2.bin:file"], found["data.bin:file"]), (found["best.pt:w"], found["last.pt:w"])
    assert all({t.codec for t in pair} == {"raw", "same"} for pair in pairs)
    assert [min(t.bytes_after for t in pair) for pair in pairs] == [0, 0]
