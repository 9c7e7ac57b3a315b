"""`safe_only` in every function that reads a checkpoint: what could run code is refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec.errors import UnsafeCheckpoint
from tests.cli.run import Cli


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


@pytest.fixture
def risky(tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save({**content, "extra": Attack()}, "risky.pt")
    statecodec.compress("risky.pt", "risky.sc.safetensors")
    return tmp_path


CALLS: dict[str, Callable[..., Any]] = {
    "inspect": lambda **safe: statecodec.inspect("risky.pt", **safe),
    "inspect compressed": lambda **safe: statecodec.inspect("risky.sc.safetensors", **safe),
    "load": lambda **safe: statecodec.load("risky.pt", **safe),
    "load compressed": lambda **safe: statecodec.load("risky.sc.safetensors", **safe),
    "compress": lambda **safe: statecodec.compress("risky.pt", "out.sc.safetensors", **safe),
    "compress a share": lambda **safe: statecodec.compress_share("risky.pt", "out.sc.safetensors", share="1/2", **safe),
    "restore": lambda **safe: statecodec.restore("risky.sc.safetensors", "out.pt", **safe),
    "convert by rules": lambda **safe: statecodec.convert("risky.pt", "out.sc.safetensors", "weight=raw", **safe),
    "convert an optimizer": lambda **safe: statecodec.convert("risky.pt", "out.sc.safetensors", "adamw", **safe),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_refused_by_name_and_nothing_written(call: Callable[..., Any], risky: Path) -> None:
    before = set(risky.iterdir())
    with pytest.raises(UnsafeCheckpoint, match=r"unpickling risky\.pt would import posix\.system, which can run code"):
        call(safe_only=True)
    assert set(risky.iterdir()) == before
    if call is not CALLS["convert an optimizer"]:  # it saves what it loaded, and knows no class of the attack
        call()
    assert not (risky / "executed").exists()


def test_an_honest_checkpoint_passes_everywhere(checkpoint: Path, tmp_path: Path) -> None:
    small, back = tmp_path / "x.sc.safetensors", tmp_path / "back.pt"
    made = statecodec.compress(checkpoint, small, safe_only=True)
    assert statecodec.inspect(small, safe_only=True).pickles == made.pickles
    assert statecodec.restore(small, back, safe_only=True).pickles == made.pickles
    statecodec.convert(back, tmp_path / "foam.pt", "foam(level=1)", safe_only=True)
    assert set(statecodec.load(small, safe_only=True)) == set(torch.load(checkpoint, weights_only=False))
    (found,) = made.pickles
    assert (found.file, found.can_run_code, found.unread) == ("ckpt.pt", (), None)
    assert {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2"} <= set(found.globals)


def test_what_another_layout_is_said_to_be_hides_nothing(risky: Path) -> None:
    """In a directory a damaged archive is carried as bytes: what is not read is not called safe."""
    folder = risky / "run"
    folder.mkdir()
    (folder / "cut.pt").write_bytes((risky / "risky.pt").read_bytes()[:-50])
    statecodec.compress(folder, risky / "run.sc.safetensors")
    for path in (folder, risky / "run.sc.safetensors"):
        with pytest.raises(UnsafeCheckpoint, match=r"what unpickling cut\.pt would run cannot be told"):
            statecodec.load(path, safe_only=True)
    statecodec.save({"weight": torch.ones(3)}, risky / "own.sc.safetensors")
    assert statecodec.inspect(risky / "own.sc.safetensors", safe_only=True).pickles == ()


def test_only_what_is_looked_at_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file that is no checkpoint is not decoded to see whether it is a pickle."""
    from statecodec.checkpoint.stored import StoredCheckpoint

    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"w": torch.ones(5000, 800)}, folder / "a.pt")  # four chunks
    (folder / "data.bin").write_bytes(bytes(range(1, 251)) * 40_000)
    statecodec.compress(folder, tmp_path / "x.sc.safetensors")
    decoded: set[tuple[int, int]] = set()
    whole = StoredCheckpoint.decode_chunk
    monkeypatch.setattr(
        StoredCheckpoint,
        "decode_chunk",
        lambda self, item, n, *args: decoded.add((item, n)) or whole(self, item, n, *args),
    )
    statecodec.inspect(tmp_path / "x.sc.safetensors", safe_only=True)
    assert len(decoded) == 3, "a chunk of each skeleton, and the one that the first bytes reach into"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def test_the_command_line(risky: Path, cli: Cli) -> None:
    for words in (
        ["inspect", "risky.pt"], ["compress", "risky.pt", "-o", "out.sc.safetensors"],
        ["restore", "risky.sc.safetensors", "-o", "out.pt"], ["convert", "risky.pt", "out.pt", "--to", "torch"],
    ):  # fmt: skip
        done = cli(*words, "--safe-only", "--json")
        assert (done.code, done.json()["error"]["code"]) == (1, "layout.unsafe"), words
    shown = cli("inspect", "risky.pt")
    assert "unpickling risky.pt would import what can run code: posix.system" in shown.out
    assert cli("inspect", "risky.pt", "--json").json()["pickles"][0]["can_run_code"] == ["posix.system"]
    torch.save({"weight": torch.ones(3)}, "plain.pt")
    assert "3 names, none of which can run code" in cli("inspect", "plain.pt").out
