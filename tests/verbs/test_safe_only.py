"""`safe_only` in every function that reads a checkpoint: what could run code is refused before anything is written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import statecodec
from statecodec.checkpoint.stored import StoredCheckpoint
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


@pytest.fixture
def without_decoding(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """No tensor can be decoded; the chunks of bytes that are read (item, number) are noted."""
    monkeypatch.delattr(StoredCheckpoint, "decode_chunk")
    read: set[tuple[int, int]] = set()
    whole = StoredCheckpoint.chunk_bytes
    monkeypatch.setattr(StoredCheckpoint, "chunk_bytes", lambda s, item, n: read.add((item, n)) or whole(s, item, n))
    return read


def test_inspecting_compressed_files_lists_what_the_originals_import(
    tmp_path: Path, without_decoding: set[tuple[int, int]]
) -> None:
    """Also where the pickle is so short that numbers follow within the file's first bytes."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"w": torch.ones(300, 100), "extra": Attack()}, folder / "packed.pt")
    torch.save([torch.ones(3), Attack()], folder / "a shared record.pt")
    (folder / "bare.pkl").write_bytes(pickle.dumps(Attack()))
    (folder / "notes.txt").write_text("not a pickle")
    save_file({"w": torch.ones(30, 10)}, folder / "model.safetensors")
    for pack in ("zstd", "none"):
        statecodec.compress(folder, tmp_path / f"{pack}.sc.safetensors", pack=pack)
        found = statecodec.inspect(tmp_path / f"{pack}.sc.safetensors").pickles
        assert found == statecodec.inspect(folder).pickles
        assert [p.can_run_code for p in found] == [("posix.system",)] * 3
    assert without_decoding


def test_of_damaged_bytes_it_cannot_be_told(checkpoint: Path, tmp_path: Path) -> None:
    """What can be shown of the rest is shown."""
    path = tmp_path / "x.sc.safetensors"
    statecodec.compress(checkpoint, path, pack="none")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x03\x04") + 8] ^= 1
    path.write_bytes(data)
    report = statecodec.inspect(path)
    assert len(report.tensors) > 3
    (found,) = report.pickles
    assert (found.file, found.globals) == ("ckpt.pt", ())
    assert "damaged" in str(found.unread)
    with pytest.raises(UnsafeCheckpoint, match=r"cannot be told .*damaged"):
        statecodec.inspect(path, safe_only=True)


def test_only_what_is_looked_at_is_decoded(tmp_path: Path, without_decoding: set[tuple[int, int]]) -> None:
    """A large file that is no checkpoint is not decoded to see whether it is a pickle."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"w": torch.ones(5000, 800)}, folder / "a.pt")
    (folder / "data.bin").write_bytes(bytes(range(1, 251)) * 40_000)
    statecodec.compress(folder, tmp_path / "x.sc.safetensors")
    statecodec.inspect(tmp_path / "x.sc.safetensors", safe_only=True)
    assert len(without_decoding) == 2, "a chunk of the archive's headers, and the other file's first one"


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
