"""Conversions: between codecs (what is not named stays bit for bit), and between optimizers that then resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import statecodec
from statecodec.checkpoint import spill
from statecodec.errors import OptimizerError, OutputExists, UsageError
from statecodec.format import Reader
from statecodec.optim import FOAM, AdamW, LoRAPre, SlimAdam, StateOptimizer
from statecodec.verbs.convert_target import Target
from tests.format.test_hostile import _peak as peak

OPTIMIZERS: dict[str, tuple[type[StateOptimizer], dict[str, Any]]] = {
    "foam(level=2)": (FOAM, {"level": 2}),
    "slimadam": (SlimAdam, {}),
    "lorapre(rank=4)": (LoRAPre, {"rank": 4}),
    "adamw(moments=companded8)": (AdamW, {"moments": "companded8"}),
}


class Net(nn.Module):
    """Names that SlimAdam's table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.lm_head = nn.Linear(96, 80), nn.Linear(80, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down_proj(self.up_proj(x).relu()).relu())


def net() -> nn.Module:
    torch.manual_seed(3)
    return Net()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 96, generator=generator), torch.randn(16, 8, generator=generator)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A torch AdamW checkpoint after 20 steps."""
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95))
    for i in range(20):
        step(model, optimizer, i)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


CODECS = ["companded(curve=log)", "folded(level=2)", "shared(dims=[1])", "lowrank(rank=1,form=rank_one)", "raw", "cast"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("start", ["plain", "compressed"])
def test_codecs(checkpoint: Path, codec: str, start: str, tmp_path: Path) -> None:
    source = checkpoint if start == "plain" else tmp_path / "start.sc.safetensors"
    if start == "compressed":
        statecodec.compress(checkpoint, source, preset="small")
    rule = f"exp_avg_sq:ndim>=2={codec}"
    report = statecodec.convert(source, tmp_path / "b.sc.safetensors", rule)
    with statecodec.open(source) as before, statecodec.open(tmp_path / "b.sc.safetensors") as after:
        assert before.names() == after.names()
        for name in before.names():
            old, new = before.read(name), after.read(name)
            touched = name.endswith("exp_avg_sq") and old.ndim >= 2
            expected = statecodec.codecs.parse(codec).encode(old).decode() if touched else old
            assert torch.equal(new, expected), name
            if touched and codec != "raw":
                assert after.info(name)["codec"]["name"] == codec.split("(")[0]
    found = statecodec.diff(source, tmp_path / "b.sc.safetensors").total
    assert report.total == found
    assert all(t.error is None for t in report.tensors if t.role == "weight")
    statecodec.restore(tmp_path / "b.sc.safetensors", tmp_path / "back.pt")
    assert torch.load(tmp_path / "back.pt", weights_only=True)["epoch"] == 7


def test_untouched_parts_are_copied_not_encoded_again(checkpoint: Path, tmp_path: Path) -> None:
    first = statecodec.compress(checkpoint, tmp_path / "a.sc.safetensors", preset="live")
    statecodec.convert(first.path, tmp_path / "b.sc.safetensors", "exp_avg_sq=raw")
    with Reader(first.path) as a, Reader(tmp_path / "b.sc.safetensors") as b:
        for item in a.items:
            if item.attributes.get("role") != "exp_avg_sq":
                old, new = a.read(item.name), b.read(item.name)
                assert old.codec == new.codec
                assert all(torch.equal(old.parts[k], new.parts[k]) for k in old.parts)


def test_a_link_comes_out_standing_alone(checkpoint: Path, tmp_path: Path) -> None:
    base = statecodec.compress(checkpoint, tmp_path / "a.sc.safetensors")
    value = torch.load(checkpoint, weights_only=True)
    value["model"]["up_proj.weight"] += 1e-6
    torch.save(value, tmp_path / "next.pt")
    rule = ["*down_proj.weight:weight=residual"]
    link = statecodec.compress(tmp_path / "next.pt", tmp_path / "l.sc.safetensors", base=base.path, rules=rule)
    made = statecodec.convert(link.path, tmp_path / "alone.sc.safetensors", "exp_avg=companded(bits=4)")
    with statecodec.open(link.path) as a, statecodec.open(made.path) as b:
        for name in a.names():
            if not name.endswith("exp_avg"):
                assert torch.equal(a.read(name), b.read(name))
    Path(base.path).unlink()
    assert statecodec.load(made.path)["epoch"] == 7


def test_values_that_a_codec_refuses_stay(checkpoint: Path, tmp_path: Path) -> None:
    value = torch.load(checkpoint, weights_only=True)
    value["optimizer"]["state"][0]["exp_avg"][0, 0] = float("inf")
    torch.save(value, checkpoint)
    first = statecodec.compress(checkpoint, tmp_path / "a.sc.safetensors", preset="lossless")
    made = statecodec.convert(first.path, tmp_path / "b.sc.safetensors", "exp_avg=companded")
    assert any("left as it is" in note and "infinities" in note for note in made.notes)
    assert torch.isinf(statecodec.load(made.path)["optimizer"]["state"][0]["exp_avg"][0, 0])


@pytest.mark.parametrize("to", OPTIMIZERS)
@pytest.mark.parametrize("suffix", [".pt", ".sc.safetensors"])
def test_optimizers_resume_from_it_and_lead_back(checkpoint: Path, to: str, suffix: str, tmp_path: Path) -> None:
    kind, options = OPTIMIZERS[to]
    report = statecodec.convert(checkpoint, tmp_path / f"b{suffix}", to)
    converted = statecodec.load(tmp_path / f"b{suffix}")
    assert converted["epoch"] == 7
    # What the class makes of the torch checkpoint when it loads it itself is what convert wrote.
    model = net()
    model.load_state_dict(converted["model"])
    live = kind(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, **options)
    live.load_state_dict(converted["optimizer"])
    assert live.load_report.exact, str(live.load_report)
    other = net()
    direct = kind(other.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, **options)
    original = torch.load(checkpoint, weights_only=True)
    other.load_state_dict(original["model"])
    direct.load_state_dict(original["optimizer"])
    for i in range(3):
        step(model, live, 100 + i)
        step(other, direct, 100 + i)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert report.total is not None
    assert report.total["worst_update_error"] > 0

    statecodec.convert(tmp_path / f"b{suffix}", tmp_path / "back.pt", "torch")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    torch.optim.AdamW(net().named_parameters()).load_state_dict(back["optimizer"])
    first, second = (c["optimizer"]["state"] for c in (original, back))
    assert first.keys() == second.keys()
    assert all(first[i]["step"] == second[i]["step"] for i in first)
    assert torch.equal(first[1]["exp_avg"], second[1]["exp_avg"]), "vectors stay exact"
    total = statecodec.diff(checkpoint, tmp_path / "back.pt").total
    if kind is AdamW:
        assert total["u_rms"] < 0.02
    if kind is SlimAdam:
        assert total["exp_avg_relative_rms"] == 0.0


def test_targets() -> None:
    assert Target.parse("exp_avg=raw") is None
    for text in ("foam(level", "foam(level=2", "foam(level=2)x"):
        with pytest.raises(UsageError, match="closing bracket"):
            Target.parse(text)
    assert Target.parse("foam") == Target("foam", {})
    parsed = Target.parse("slimadam(rules=r.json, decay_vectors=true, eps=1e-6)")
    assert parsed == Target("slimadam", {"rules": "r.json", "decay_vectors": True, "eps": 1e-6})
    for text in ("foam(level)", "torch(x=1)"):
        with pytest.raises(UsageError):
            Target.parse(text)


def test_what_it_refuses(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not both"):
        statecodec.convert(checkpoint, tmp_path / "b.pt", ["foam", "exp_avg=raw"])
    with pytest.raises(UsageError, match=r"to a layout, or .* not both"):
        statecodec.convert(checkpoint, tmp_path / "b.pt", "foam", layout="torch")
    with pytest.raises(UsageError, match="to what"):
        statecodec.convert(checkpoint, tmp_path / "b.pt", [])
    with pytest.raises(OptimizerError, match="altitude"):
        statecodec.convert(checkpoint, tmp_path / "b.pt", "foam(altitude=3)")
    with pytest.raises(UsageError, match="already"):
        statecodec.convert(checkpoint, tmp_path / "b.pt", "torch")
    with pytest.raises(OutputExists):
        statecodec.convert(checkpoint, checkpoint, "foam")
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "weights.pt")
    net = nn.Linear(8, 8)
    for made, target, message in (
        (torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), "torch", "torch.optim's already; `restore`"),
        (statecodec.optim.Lion(net.parameters(), lr=0.1), "torch", "that of lion, .* it knows adamw"),
        (
            torch.optim.Adafactor(net.parameters()),
            "adamw",
            r"eps is \(None, 0.001\) here, as in Adafactor: adamw",
        ),
    ):
        net(torch.ones(1, 8)).sum().backward()
        made.step()
        torch.save({"optimizer": made.state_dict()}, tmp_path / "other.pt")
        with pytest.raises(UsageError, match=message):
            statecodec.convert(tmp_path / "other.pt", tmp_path / "never.pt", target)
    with pytest.raises(UsageError, match="no optimizer state"):
        statecodec.convert(tmp_path / "weights.pt", tmp_path / "b.pt", "foam")
    assert not (tmp_path / "b.pt").exists()


def test_rules_that_share_nothing_are_a_note_and_a_frozen_parameter_is_no_loss(tmp_path: Path) -> None:
    params = {name: nn.Parameter(torch.ones(6, 4)) for name in ("one.weight", "two.weight", "frozen.weight")}
    params["frozen.weight"].requires_grad_(False)
    optimizer = torch.optim.AdamW(params.items())
    for name in ("one.weight", "two.weight"):
        params[name].grad = torch.ones(6, 4)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    report = statecodec.convert(tmp_path / "a.pt", tmp_path / "b.pt", "slimadam")
    assert any("SlimAdam rules that match no parameter" in note for note in report.notes)
    assert not any("missing" in note for note in report.notes)


@pytest.mark.parametrize("to", ["foam(level=2)", "slimadam"])
def test_notes_are_of_the_whole_optimizer_not_of_its_parameters_one_by_one(
    checkpoint: Path, to: str, tmp_path: Path
) -> None:
    """Settings are the checkpoint's, and SlimAdam's rules match some parameters: nothing needs to be said."""
    content = torch.load(checkpoint, weights_only=True)
    content["optimizer"]["param_groups"][0] |= {"lr": 3e-4, "weight_decay": 0.2}
    torch.save(content, checkpoint)
    report = statecodec.convert(checkpoint, tmp_path / "b.pt", to)
    (group,) = torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (3e-4, 0.2, (0.9, 0.95))
    assert not report.notes


@pytest.mark.parametrize(("to", "ending"), [("foam(level=2)", "pt"), ("adamw(moments=dense)", "sc.safetensors")])
def test_the_memory_does_not_grow_with_the_checkpoint(
    to: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few tensors are in memory at a time, however many there are."""
    monkeypatch.setattr(spill, "_BETWEEN", 4 << 20)  # in proportion to these small tensors

    def converted(count: int) -> None:
        weights = {f"w.{i}": torch.rand(768, 768) for i in range(count)}
        state = {
            i: {"step": torch.tensor(3.0), "exp_avg": w + 1, "exp_avg_sq": w + 2}
            for i, w in enumerate(weights.values())
        }
        group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": list(range(count))}
        torch.save({"model": weights, "optimizer": {"state": state, "param_groups": [group]}}, tmp_path / "x.pt")
        del weights, state
        before = peak(reset=True)
        statecodec.convert(tmp_path / "x.pt", tmp_path / f"y.{ending}", to, force=True)
        grown.append(peak() - before)

    grown: list[int] = []
    converted(4)
    converted(4)  # everything is compiled and loaded
    converted(24)  # 142 MB more in the file
    assert grown[2] - max(grown[1], 0) < 80 << 20, grown
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("x.pt", f"y.{ending}")] == []
