"""Room on the disk is set aside before a file is written, where the system can."""

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
    monkeypatch.setattr(files, "_fallocate", lambda: None if code is None else _failing(code))
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
    monkeypatch.setattr(files, "_fallocate", lambda: _failing(code))
    monkeypatch.setattr("statecodec.checkpoint.stored.StoredCheckpoint.decode_chunk", None)
    with pytest.raises(OutputFailed, match=r"back\.pt"):
        statecodec.restore(tmp_path / "a.sc.safetensors", tmp_path / "back.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
