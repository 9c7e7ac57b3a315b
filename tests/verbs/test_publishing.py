"""Restoring and compressing give nothing a name before it is whole, and replace nothing that they were not told to."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

import statecodec
from statecodec.errors import OutputFailed, UsageError


@pytest.fixture
def packed(checkpoint: Path) -> Path:
    statecodec.compress(checkpoint, checkpoint.with_name("packed.sc.safetensors"))
    return checkpoint.with_name("packed.sc.safetensors")


@pytest.mark.parametrize("force", [False, True])
def test_a_file_never_replaces_a_directory_or_a_device(packed: Path, tmp_path: Path, force: bool) -> None:
    folder, device = tmp_path / "folder", tmp_path / "device"
    folder.mkdir()
    (folder / "keep").touch()
    os.mkfifo(device)
    with pytest.raises(UsageError, match="not replaced"):
        statecodec.restore(packed, device, force=force)
    statecodec.restore(packed, folder, force=force)  # into it, under the file's own name
    assert sorted(os.listdir(folder)) == ["ckpt.pt", "keep"]
    assert stat.S_ISFIFO(device.stat().st_mode)


def test_a_directory_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").touch()
    (tmp_path / "file").write_text("mine")
    statecodec.compress(tmp_path / "run", tmp_path / "run.sc.safetensors")
    with pytest.raises(UsageError, match="not replaced"):
        statecodec.restore(tmp_path / "run.sc.safetensors", tmp_path / "file", force=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_replaces_a_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "new").write_text("new")
    statecodec.compress(tmp_path / "run", tmp_path / "run.sc.safetensors")
    (tmp_path / "run" / "old").write_text("old")
    statecodec.restore(tmp_path / "run.sc.safetensors", force=True)
    assert sorted(os.listdir(tmp_path)) == ["run", "run.sc.safetensors"]
    assert os.listdir(tmp_path / "run") == ["new"]


def test_a_folder_that_cannot_be_written_to(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputFailed, match="there is no directory"):
        statecodec.restore(packed, tmp_path / "no" / "such" / "folder")


def test_no_thread_writes_after_a_cancelled_restore(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor that is closed may be somebody else's file a moment later."""
    from statecodec.verbs import restore as module

    closed: set[int] = set()
    late = []
    write, close = module.write_exactly, os.close

    def slow_write(fd: int, offset: int, data: memoryview) -> None:
        time.sleep(0.01)
        late.extend([fd] if fd in closed else [])
        write(fd, offset, data)

    def noted_close(fd: int) -> None:
        closed.add(fd)
        close(fd)

    def cancel(done: int, total: int, stage: str) -> None:
        if done > total // 3:
            closed.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_exactly", slow_write)
    monkeypatch.setattr(module.os, "close", noted_close)
    try:
        statecodec.restore(packed, tmp_path / "out.pt", progress=cancel, threads=4)
    except KeyboardInterrupt as error:
        kept = error  # its traceback keeps every frame alive, as a debugger or a log would
        time.sleep(0.2)
        assert kept.__traceback__ is not None
    assert late == []
    assert not (tmp_path / "out.pt").exists()
