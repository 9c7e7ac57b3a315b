"""What `diff` calls identical, and what it says of what is not."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import statecodec
from statecodec.errors import VerificationFailed

Change = Callable[[Path], None]


@pytest.fixture
def run(tmp_path: Path, content: dict[str, Any]) -> Path:
    """A directory checkpoint with files of every kind."""
    folder = tmp_path / "run"
    (folder / "empty").mkdir(parents=True)
    torch.save(content, folder / "ckpt.pt")
    save_file({"w": torch.arange(6.0)}, folder / "model.safetensors")
    (folder / "notes.txt").write_text("first")
    (folder / "nothing").touch()
    return folder


def resave(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)


CHANGES: dict[str, tuple[Change, str]] = {
    "text": (lambda run: (run / "notes.txt").write_text("other") and None, "notes.txt"),
    "longer text": (lambda run: (run / "notes.txt").write_text("longer than before") and None, "notes.txt"),
    "another file": (lambda run: (run / "more.txt").write_text("x") and None, "more.txt"),
    "an empty file": (lambda run: (run / "more.txt").touch(), "more.txt"),
    "no file": (lambda run: (run / "nothing").unlink(), "nothing"),
    "no folder": (lambda run: (run / "empty").rmdir(), "empty"),
    "metadata": (
        lambda run: save_file({"w": torch.arange(6.0)}, run / "model.safetensors", {"k": "v"}),
        "model.safetensors",
    ),
    "lr": (
        lambda run: resave(run / "ckpt.pt", lambda c: c["optimizer"]["param_groups"][0].update(lr=0.5)),
        "ckpt.pt",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_identical_means_every_byte_of_a_directory(run: Path, tmp_path: Path, kind: str, compressed: bool) -> None:
    change, named = CHANGES[kind]
    other = tmp_path / "other"
    shutil.copytree(run, other)
    a, b = run, other
    if compressed:
        a = tmp_path / "run.sc.safetensors"
        statecodec.compress(run, a, preset="lossless")
    assert statecodec.diff(a, b).identical
    assert statecodec.diff(b, a).identical
    change(other)
    for found in (statecodec.diff(a, b), statecodec.diff(b, a)):
        assert not found.identical
        assert found.tensors_equal
        assert found.rest_differs == (named,)
        document = found.to_json()
        assert (document["identical"], document["tensors_equal"]) == (False, True)


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
def test_checksums_of_tensors_are_not_something_else(run: Path, tmp_path: Path, directory: bool) -> None:
    """A zip's CRCs, and torch's text made of them, follow from the tensors."""
    original = run if directory else run / "ckpt.pt"
    packed, restored, trained = tmp_path / "x.sc.safetensors", tmp_path / "restored", tmp_path / "on" / original.name
    statecodec.compress(original, packed)
    statecodec.restore(packed, restored)
    trained.parent.mkdir()
    (shutil.copytree if directory else shutil.copy)(original, trained)
    resave(trained / "ckpt.pt" if directory else trained, lambda c: next(iter(c["model"].values())).add_(1.0))
    for other in (restored, trained):
        for pair in ((original, other), (other, original), (packed, other), (other, packed)):
            found = statecodec.diff(*pair)
            assert found.rest_differs == ()
            assert found.identical == (set(pair) == {packed, restored})
    with pytest.raises(VerificationFailed, match="not tensors differ"):
        statecodec.verify(packed, against=restored)


def test_the_same_values_written_differently(checkpoint: Path, tmp_path: Path) -> None:
    """torch.save names its archive after the file."""
    other = tmp_path / "other.pt"
    torch.save(torch.load(checkpoint, weights_only=False), other)
    found = statecodec.diff(checkpoint, other)
    assert (found.rest_differs, found.values) == (("ckpt.pt",), ())
    assert "only written differently" in str(found.notes)


def test_another_learning_rate_is_not_identical(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    shutil.copy(checkpoint, other)
    assert statecodec.diff(checkpoint, other).identical
    resave(other, lambda c: c["optimizer"]["param_groups"][1].update(lr=0.5))
    found = statecodec.diff(checkpoint, other)
    assert not found.identical
    assert found.rest_differs == ("ckpt.pt",)


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), True),
        (torch.tensor([math.nan]), torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.bfloat16), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [2.0]]), False),
        (torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), False),
        (torch.tensor([1.0]), torch.tensor([math.inf]), False),
    ],
    ids=["minus zero", "another NaN", "bf16", "shape", "dtype", "infinity"],
)
def test_identical_means_every_bit_of_a_tensor(tmp_path: Path, a: torch.Tensor, b: torch.Tensor, equal: bool) -> None:
    for name, x in (("a", a), ("b", b)):
        save_file({"w": x}, tmp_path / f"{name}.safetensors")
    found = statecodec.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not found.identical
    assert found.tensors_equal == equal
    assert statecodec.diff(tmp_path / "b.safetensors", tmp_path / "b.safetensors").identical


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_what_is_not_compared_as_numbers_is_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.arange(600).remainder(2).to(dtype)
    y = x.clone()
    y[:37] = x[1:38]  # neighbours differ
    for name, value in (("a", x), ("b", y)):
        torch.save({"codes": value}, tmp_path / f"{name}.pt")
    found = statecodec.diff(tmp_path / "a.pt", tmp_path / "b.pt")
    assert [(t.differing, t.mismatched, t.identical) for t in found.tensors] == [(37, 0, False)]
    assert not found.tensors_equal
    statecodec.compress(tmp_path / "a.pt", tmp_path / "a.sc.safetensors")
    with pytest.raises(VerificationFailed, match="37 elements"):
        statecodec.verify(tmp_path / "a.sc.safetensors", tmp_path / "b.pt")


def test_a_saved_value_differs_in_its_settings(tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        statecodec.save({"w": torch.ones(3), "lr": lr}, tmp_path / f"{name}.sc.safetensors")
    found = statecodec.diff(tmp_path / "a.sc.safetensors", tmp_path / "b.sc.safetensors")
    assert found.tensors_equal
    assert not found.identical


def test_weights_whose_steps_are_not_known_do_not_count_as_exact(tmp_path: Path) -> None:
    """Moments of one weight, which is exact, say nothing of the error of another."""
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 4), "exp_avg_sq": torch.ones(4, 4)}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "params": [0], "param_names": ["known"]}
    content = {
        "model": {"known": torch.ones(4, 4), "other": torch.ones(5, 4)},
        "optimizer": {"state": {0: state}, "param_groups": [group]},
    }
    torch.save(content, tmp_path / "a.pt")
    content["model"]["other"] += 0.5
    torch.save(content, tmp_path / "b.pt")
    assert statecodec.diff(tmp_path / "a.pt", tmp_path / "a.pt").total["weight_step_error"] == 0.0
    assert "weight_step_error" not in statecodec.diff(tmp_path / "a.pt", tmp_path / "b.pt").total
