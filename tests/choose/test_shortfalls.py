"""Where no step is known, or none that 24 bits can keep to: what is done, what is said, and what the file promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import statecodec
from statecodec.choose.budget import Budget
from statecodec.choose.shortfalls import Kept, Shortfall, Tally, Why
from statecodec.errors import CorruptFile, UsageError

BOTH = {"u_rms": 0.01, "weight_step_error": 0.01}
UPDATES = {"u_rms": 0.01}
LR = 1e-3
Content = dict[str, Any]
Named = Iterable[tuple[str, nn.Parameter]]


def content(make: Callable[[Named], torch.optim.Optimizer], *, frozen: int = 0, dtype: Any = None) -> Content:
    """A small network after steps of an optimizer, the first layers frozen, as it is saved."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(200, 96), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96)).to(dtype)
    for layer in net[:frozen]:
        layer.requires_grad_(requires_grad=False)
    optimizer = make((name, p) for name, p in net.named_parameters() if p.requires_grad)
    for _ in range(5):
        optimizer.zero_grad()
        tokens = torch.randint(0, 180, (64,))
        nn.functional.cross_entropy(net(tokens), tokens % 50).backward()
        optimizer.step()
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


def adam(**changes: Any) -> Content:
    """AdamW's, with other settings of its group; None takes one out."""
    saved = content(lambda named: torch.optim.AdamW(named, lr=LR))
    (group,) = saved["optimizer"]["param_groups"]
    for key, value in changes.items():
        group.pop(key) if value is None else group.update({key: value})
    return saved


def nameless(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **options: Any) -> Content:
    """The same by an optimizer that was given no names."""
    return content(lambda named: make([p for _, p in named]), **options)


def with_average(saved: Content) -> Content:
    return saved | {"model_ema": {k: w + 1e-2 * torch.randn_like(w) for k, w in saved["model"].items()}}


def without_moments_of(saved: Content, index: int) -> Content:
    """One parameter whose moments are all zero: no gradient ever reached it."""
    state = saved["optimizer"]["state"][index]
    for key in state.keys() - {"step"}:
        state[key].zero_()
    return saved


def update_without_root(saved: Content) -> Content:
    state = saved["optimizer"]["state"][0]
    state["exp_avg_sq"][:20] = 0.0
    state["exp_avg"][:20] = 1e-12
    return saved


CASES: dict[str, tuple[Callable[[], Content], dict[str, float], tuple[str, ...], set[str]]] = {
    # what is saved, which halves of 1 % are promised, what notes say, how the weights are stored
    "AdamW": (adam, BOTH, (), {"uniform"}),
    "no lr": (lambda: adam(lr=None), UPDATES, ("no learning rate; keep lr",), {"uniform"}),
    "lr is 0": (lambda: adam(lr=0.0), UPDATES, ("learning rate is 0; keep initial_lr",), {"uniform"}),
    "lr is 0, with initial_lr": (lambda: adam(lr=0.0, initial_lr=LR), BOTH, (), {"uniform"}),
    "averages": (lambda: with_average(adam()), BOTH, (), {"uniform"}),
    "averages without lr": (
        lambda: with_average(adam(lr=None)), UPDATES, ("3 weights (model.0.weight",), {"uniform"},
    ),
    "frozen": (lambda: content(lambda n: torch.optim.AdamW(n, lr=LR), frozen=1), BOTH, (), {"uniform", "raw"}),
    "frozen, others without names": (
        lambda: nameless(lambda ps: torch.optim.AdamW(ps[2:], lr=LR), frozen=1),
        UPDATES, ("not certain whose the optimizer's states are; give the optimizer named_parameters()",), {"split"},
    ),
    "moments are zero": (lambda: without_moments_of(adam(), 0), BOTH, (), {"uniform", "raw"}),
    "momentum is zero": (
        lambda: without_moments_of(content(lambda n: torch.optim.SGD(n, 10.0, momentum=0.9)), 0),
        BOTH, (), {"uniform", "raw"},
    ),
    "SGD with momentum": (lambda: content(lambda n: torch.optim.SGD(n, 10.0, momentum=0.9)), BOTH, (), {"uniform"}),
    "SGD": (lambda: content(lambda n: torch.optim.SGD(n, LR)), {}, ("has no moments of an optimizer",), {"split"}),
    "weights alone": (lambda: {"model": adam()["model"]}, {}, ("has no moments of an optimizer",), {"split"}),
    "RMSprop": (
        lambda: content(lambda n: torch.optim.RMSprop(n, LR)),
        {}, ("do not tell its updates", "3 second moments (optimizer.state.0.square_avg"), {"split"},
    ),
    "Adafactor": (
        lambda: content(lambda n: torch.optim.Adafactor(n, LR)), {}, ("do not tell its updates",), {"split"},
    ),
    "Adagrad": (lambda: content(lambda n: torch.optim.Adagrad(n, LR)), {}, ("do not tell its updates",), {"split"}),
    "Adamax": (lambda: content(lambda n: torch.optim.Adamax(n, LR)), UPDATES, ("do not tell its updates",), {"split"}),
    "amsgrad": (lambda: content(lambda n: torch.optim.AdamW(n, LR, amsgrad=True)), BOTH, (), {"uniform"}),
    "exp_avg_sq is 0 where exp_avg is not": (lambda: update_without_root(adam()), BOTH, (), {"uniform"}),
    "bf16": (
        lambda: content(lambda n: torch.optim.AdamW(n, LR), dtype=torch.bfloat16), UPDATES, (), {"raw"},
    ),
    "fp16": (
        lambda: content(lambda n: torch.optim.AdamW(n, LR, eps=1e-4), dtype=torch.float16),
        {}, ("kept exact, because exp_avg_sq is 0 where exp_avg is not",), {"raw"},
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    torch.save(CASES[request.param][0](), tmp_path / "ckpt.pt")
    return request.param, tmp_path / "ckpt.pt"


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt() / a.double().square().mean().sqrt())


def test_what_is_promised_and_what_is_not_is_said(case: tuple[str, Path]) -> None:
    name, path = case
    _, asked, words, codecs = CASES[name]
    made = statecodec.compress(path, path.with_name("c.sc.safetensors"), max_step_error=0.01, verify=True)
    notes = [note for note in made.notes if "of no known kind" not in note]
    assert [word for word, note in zip(words, notes, strict=True) if word not in note] == []
    assert all(len(note) < 400 for note in notes)
    for report in (made, statecodec.inspect(made.path), statecodec.verify(made.path)):
        assert report.asked == asked
        assert report.notes == made.notes
        assert ("errors up to 1 %" in str(report)) == (asked == BOTH)
        assert ("of a step," in str(report).partition("\n")[0]) is False
    large = [t for t in made.tensors if t.role == "weight" and t.shape[1:]]
    assert {t.codec.partition("(")[0] for t in large} == codecs
    saved = torch.load(path, weights_only=True)
    statecodec.restore(made.path, path.with_name("back.pt"))
    found = torch.load(path.with_name("back.pt"), weights_only=True)
    if "weight_step_error" not in asked:
        assert all(off(w, found["model"][k]) <= 2.0**-16 for k, w in saved["model"].items())
    if name == "averages without lr":
        assert all(torch.equal(found["model_ema"][k], w) for k, w in saved["model_ema"].items())


def test_shares_and_memory_say_the_same(case: tuple[str, Path]) -> None:
    _, path = case
    folders = {name: path.with_name(name) for name in ("one", "several", "memory")}
    for folder in folders.values():
        folder.mkdir()
    one, several, memory = (folder / "ckpt.sc.safetensors" for folder in folders.values())
    whole = statecodec.compress(path, one, max_step_error=0.01)
    for number in (3, 1, 2):
        statecodec.compress_share(path, several, share=f"{number}/3", max_step_error=0.01)
    joined = statecodec.finalize(path, several)
    loaded = statecodec.compress(torch.load(path, weights_only=True), memory, max_step_error=0.01)
    assert joined.notes == whole.notes == loaded.notes
    assert joined.asked == whole.asked == loaded.asked
    assert one.read_bytes() == several.read_bytes()


def test_a_damaged_share_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(adam(lr=None), tmp_path / "ckpt.pt")
    for value in ({}, {"bounded": [], "tallies": {"no rate": [1, ["no.such.tensor"], 0.0]}}, [], {"tallies": 1}):
        with monkeypatch.context() as patch:
            patch.setattr(Kept, "to_json", lambda _, value=value: value)
            statecodec.compress_share(tmp_path / "ckpt.pt", share="1/1")
        with pytest.raises(CorruptFile, match="damaged"):
            statecodec.finalize(tmp_path / "ckpt.pt")
        for left in tmp_path.glob("*.share-*"):
            left.unlink()


def test_names_that_the_optimizer_saves_tell_what_is_frozen(tmp_path: Path) -> None:
    """What the note advises."""
    saved = content(lambda named: torch.optim.AdamW(list(named)[2:], lr=LR), frozen=1)
    report = statecodec.compress(saved, tmp_path / "c.sc.safetensors", max_step_error=0.01)
    assert report.notes == ()
    assert report.asked == BOTH


def test_a_note_is_as_short_for_many_tensors() -> None:
    found = [(f"layer.{i}.weight", Shortfall(Why.COARSE, i / 100)) for i in range(100_000)]
    parts = [Kept(frozenset({"u_rms"}), {Why.COARSE: Tally.of(found[k::7])}).to_json() for k in (3, 1, 0, 2, 6, 5, 4)]
    kept = Kept.joined(parts, {name: i for i, (name, _) in enumerate(found)})
    assert kept == Kept(frozenset({"u_rms"}), {Why.COARSE: Tally.of(found)})
    (note,) = kept.notes(Budget(0.01, 0.01))
    assert note.startswith("100,000 weights (layer.0.weight, layer.1.weight and 99,998 more): off by more than 1 % of")
    assert "the furthest by 99999 %" in note
    assert len(note) < 300


def test_weights_that_24_bits_are_too_coarse_for_are_named_with_their_error(tmp_path: Path) -> None:
    saved = adam(lr=1e-6)
    report = statecodec.compress(saved, tmp_path / "a.sc.safetensors", max_step_error=0.01)
    worst = max(t.error["step_error"] for t in report.tensors if t.role == "weight" and t.error)
    (note,) = report.notes
    assert note.startswith("3 weights (model.0.weight, model.1.weight and 1 more): off by more than 1 % of a step, ")
    said = float(note.partition("the furthest by ")[2].partition(" %")[0]) / 100
    assert said == pytest.approx(worst, rel=0.1)
    assert report.asked == BOTH  # a step is known, and reports say how far off weights are
    for rules, left in (
        (["model.0.weight=raw"], "2 weights (model.1.weight and model.3.weight)"),
        (["*.?.weight=raw"], ""),
    ):
        report = statecodec.compress(saved, tmp_path / "b.sc.safetensors", max_step_error=0.01, rules=rules, force=True)
        assert [note.partition(":")[0] for note in report.notes] == ([left] if left else [])


def test_a_copy_of_an_exact_weight_is_not_off(tmp_path: Path) -> None:
    w = torch.randn(96, 96)
    saved = {"a": w, "b": w.clone(), "c": torch.randn(96, 96)}
    report = statecodec.compress(saved, tmp_path / "a.sc.safetensors", rules=["a=raw"])
    (note,) = report.notes
    assert note.startswith("1 weight (c): stored with 24 bits")


def test_presets_say_it_too(tmp_path: Path) -> None:
    saved = {"model": adam()["model"]}
    report = statecodec.compress(saved, tmp_path / "a.sc.safetensors")
    assert report.asked == {}
    (note,) = report.notes
    assert "not within 2 % of a step, because the file has no moments of an optimizer" in note
    for preset in ("lossless", "live", "weights"):
        report = statecodec.compress(saved, tmp_path / "a.sc.safetensors", preset=preset, force=True)
        assert not any("24 bits" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"preset": "weights", "max_update_error": 0.01}, "max_update_error: .* leave no optimizer states of"),
        ({"rules": ["exp_avg=raw", "exp_avg_sq=raw"], "max_update_error": 0.01}, "max_update_error"),
        ({"rules": ["weight=raw"], "max_weight_error": 0.01}, "max_weight_error: .* leave no weights of"),
        ({"rules": ["*=raw"], "max_step_error": 0.01}, "max_step_error: .* leave no weights and optimizer states of"),
        ({"preset": "weights", "rules": ["weight=split"], "max_step_error": 0.01}, "max_step_error"),
        ({"preset": "weights", "max_step_error": 0.3, "max_update_error": 0.01}, "max_update_error"),
    ],
    ids=str,
)
def test_an_option_that_bounds_nothing_is_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    torch.save(adam(), tmp_path / "ckpt.pt")
    with pytest.raises(UsageError, match=match):
        statecodec.compress(tmp_path / "ckpt.pt", **options)
    with pytest.raises(UsageError, match=match):
        statecodec.compress_share(tmp_path / "ckpt.pt", share="1/3", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_an_option_that_bounds_something_is_not_refused(tmp_path: Path) -> None:
    target = tmp_path / "c.sc.safetensors"
    for options, asked in (
        ({"preset": "weights", "max_step_error": 0.01}, {"weight_step_error": 0.01}),
        ({"preset": "weights", "max_weight_error": 0.01}, {"weight_step_error": 0.01}),
        ({"preset": "live", "max_update_error": 0.01}, {"u_rms": 0.01}),
        ({"rules": ["model.0.weight=raw"], "max_weight_error": 0.01}, {"u_rms": 0.01, "weight_step_error": 0.01}),
    ):
        assert statecodec.compress(adam(), target, force=True, **options).asked == asked
    small = {"w": torch.randn(30, 30)}  # exact for its size
    assert statecodec.compress(small, target, max_weight_error=0.01, rules=["w=raw"], force=True).asked == {}
