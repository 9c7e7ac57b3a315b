"""Room on the disk is set aside before a file is written, and the disk is busy while it is, where the system can."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec import files
from statecodec.errors import OutputFailed


def _failing(code: int) -> object:
    def fallocate(fd: int, mode: int, offset: int, nbytes: int) -> int:
        files.ctypes.set_errno(code)
        return -1

    return fallocate


@pytest.mark.parametrize("nbytes", [0, 1, 5_000_000])
def test_a_file_gets_its_size(nbytes: int, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    files.reserve(fd, nbytes)
    assert os.fstat(fd).st_size == nbytes
    assert os.pread(fd, 10, max(nbytes - 10, 0)) == bytes(min(nbytes, 10))
    os.close(fd)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL, None])
def test_a_file_system_without_it_only_sets_the_size(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_system_call", lambda *_: None if code is None else _failing(code))
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    files.reserve(fd, 1000)
    assert os.fstat(fd).st_size == 1000
    os.close(fd)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_found_before_anything_is_decoded(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    statecodec.compress(tmp_path / "a.pt", tmp_path / "a.sc.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr(files, "_system_call", lambda *_: _failing(code))
    monkeypatch.setattr("statecodec.checkpoint.stored.StoredCheckpoint.decode_chunk", None)
    with pytest.raises(OutputFailed, match=r"back\.pt"):
        statecodec.restore(tmp_path / "a.sc.safetensors", tmp_path / "back.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_disk_is_told_of_what_was_written_before_the_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BEHIND", 50_000)
    real, told = files._system_call, list[tuple[str, int]]()

    def call(name: str, *types: object) -> object:
        function = real(name, *types)

        def counted(fd: int, *arguments: int) -> int:
            told.append((name, fd))
            return 0 if function is None else function(fd, *arguments)

        return counted

    monkeypatch.setattr(files, "_system_call", call)
    torch.save({"w": torch.randn(100_000)}, tmp_path / "a.pt")
    statecodec.compress(tmp_path / "a.pt", tmp_path / "a.sc.safetensors", preset="lossless")
    assert [name for name, _ in told] == ["sync_file_range"]
    statecodec.restore(tmp_path / "a.sc.safetensors", tmp_path / "back.pt")
    assert [name for name, _ in told] == ["sync_file_range", "fallocate", "sync_file_range"]


def test_a_system_that_cannot_be_told_is_waited_for_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (None, lambda *_: -1):
        monkeypatch.setattr(files, "_system_call", lambda *_, there=there: there)
        behind = files.WriteBehind(-1)
        behind.wrote(files._BEHIND)
        behind.wrote(files._BEHIND)
