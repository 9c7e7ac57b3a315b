"""Nothing gets its name before it is whole, nothing is replaced that should not be; a poor mount is no failure."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from statecodec import staging
from statecodec.atomic import AtomicOutput, write_file
from statecodec.errors import OutputExists, OutputFailed, UsageError


def fill(output: AtomicOutput) -> None:
    """Make a file, or a directory with one in it."""
    if output.directory:
        (output.path / "new").touch()
    else:
        with output.create() as file:
            file.write(b"new")


def publish(target: Path, *, directory: bool = False, force: bool = False) -> AtomicOutput:
    with AtomicOutput(target, directory=directory, force=force) as output:
        fill(output)
        output.finish()
        output.publish()
    return output


def failing(code: int, real: Any, when: Any = lambda *args: True) -> Any:
    """An os function that fails with `code` where `when` says so."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_a_finished_output_is_readable_and_invisible_until_it_is_published(
    tmp_path: Path, directory: bool, force: bool
) -> None:
    target = tmp_path / "target"
    if force:
        target.mkdir() if directory else target.write_bytes(b"old")
    with AtomicOutput(target, directory=directory, force=force) as output:
        fill(output)
        output.finish()
        assert output.path.name == target.name
        assert (output.path / "new").exists() if directory else output.path.read_bytes() == b"new"
        assert force == target.exists()
        assert not target.is_file() or target.read_bytes() == b"old"
        output.publish()
    assert (target / "new").exists() if directory else target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_an_output_that_is_not_published_leaves_nothing(
    tmp_path: Path, directory: bool, error: type[BaseException] | None
) -> None:
    def run() -> None:
        with AtomicOutput(tmp_path / "target", directory=directory) as output:
            fill(output)
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_file_never_replaces_a_directory_or_a_device_nor_a_directory_a_file(tmp_path: Path, force: bool) -> None:
    folder, device, file = tmp_path / "folder", tmp_path / "device", tmp_path / "file"
    folder.mkdir()
    (folder / "keep").touch()
    os.mkfifo(device)
    file.write_text("mine")
    for target, directory in ((folder, False), (device, False), (device, True), (file, True)):
        with pytest.raises(UsageError, match="not replaced"):
            AtomicOutput(target, directory=directory, force=force)
    assert (folder / "keep").exists()
    assert stat.S_ISFIFO(device.stat().st_mode)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("directory", [False, True])
def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path, directory: bool) -> None:
    target = tmp_path / "target"
    with AtomicOutput(target, directory=directory) as output:
        fill(output)
        target.write_text("somebody else's")
        with pytest.raises(OutputExists, match="meanwhile"):
            output.publish()
    assert target.read_text() == "somebody else's"
    assert os.listdir(tmp_path) == ["target"]


def test_the_old_directory_stays_where_the_new_one_cannot_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "old").touch()
    with AtomicOutput(target, directory=True, force=True) as output:
        fill(output)
        monkeypatch.setattr(os, "rename", failing(errno.EIO, os.rename, lambda source, _: source == output.path))
        with pytest.raises(OutputFailed, match="Input/output error"):
            output.publish()
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["run"]


def test_an_error_of_the_disk_is_ours(tmp_path: Path) -> None:
    with pytest.raises(OutputFailed, match="there is no directory"):
        AtomicOutput(tmp_path / "no" / "such" / "folder")
    with pytest.raises(OutputFailed, match="No space left"), AtomicOutput(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_links_are_followed_and_long_names_work(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    write_file(tmp_path / "link", b"1", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_bytes() == b"1"
    for name in ("é" * 127, "a" * 255):
        write_file(tmp_path / name, b"2")
        assert (tmp_path / name).read_bytes() == b"2"


def test_what_a_killed_run_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x.pt"
    code = (
        "import sys, time; from statecodec.atomic import AtomicOutput\n"
        "with AtomicOutput(sys.argv[1]) as output:\n"
        "    output.path.write_bytes(b'half'); print('there', flush=True); time.sleep(60)"
    )
    foreign = [tmp_path / name for name in (".x.pt.0123.tmp", ".xx.pt.0123456789abcdef.tmp")]
    for path in foreign:
        path.mkdir()
    child = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        left = set(os.listdir(tmp_path)) - {path.name for path in foreign}
        assert len(left) == 1
        publish(target, force=True)
        assert left < set(os.listdir(tmp_path)), "swept under a living writer"
        child.send_signal(signal.SIGKILL)
    publish(target, force=True)
    assert set(os.listdir(tmp_path)) == {"x.pt", *(path.name for path in foreign)}


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_mount_that_cannot_sync_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: bool, force: bool, code: int
) -> None:
    def is_folder(fd: int) -> bool:
        return stat.S_ISDIR(os.fstat(fd).st_mode)

    target = tmp_path / "x"
    if force:
        publish(target, directory=directory)
    monkeypatch.setattr(os, "fsync", failing(code, os.fsync, is_folder))
    (note,) = publish(target, directory=directory, force=force).notes
    assert "cannot sync a directory" in note
    assert target.exists()
    monkeypatch.setattr(os, "fsync", failing(code, os.fsync))
    notes = publish(target, directory=directory, force=True).notes
    assert len(notes) == (1 if directory else 2)
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_that_may_not_be_listed_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AtomicOutput(tmp_path / "x") as output:
        fill(output)
        monkeypatch.setattr(os, "open", failing(errno.EACCES, os.open, lambda path, *_: path == tmp_path))
        output.publish()
    assert output.notes
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_mount_without_permissions_is_a_note_where_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "chmod", failing(code, os.chmod))
    with AtomicOutput(tmp_path / "x") as output, output.create() as file:
        now = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        output.staging.chmod(file.fileno(), now)
        assert output.notes == ()
        output.staging.chmod(file.fileno(), 0o604)
        assert "0604" in output.notes[0]
    monkeypatch.setattr(os, "chmod", failing(errno.EIO, os.chmod))
    with pytest.raises(OutputFailed), AtomicOutput(tmp_path / "x") as output, output.create() as file:
        output.staging.chmod(file.fileno(), 0o604)


def test_a_sandbox_that_follows_no_path_lets_permissions_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "chmod", failing(errno.EPERM, os.chmod, lambda file, *_: not isinstance(file, int)))
    (tmp_path / "sub").mkdir()
    with AtomicOutput(tmp_path / "x") as output:
        fill(output)
        output.staging.chmod(tmp_path / "sub", 0o711)
    assert output.notes == ()
    assert stat.S_IMODE((tmp_path / "sub").stat().st_mode) == 0o711


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_a_mount_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "link", failing(code, os.link))
    write_file(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
    with AtomicOutput(tmp_path / "y") as output:
        fill(output)
        (tmp_path / "y").write_text("theirs")
        with pytest.raises(OutputExists, match="meanwhile"):
            output.publish()
    assert (tmp_path / "y").read_text() == "theirs"


def test_a_mount_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.fcntl, "flock", failing(errno.ENOLCK, staging.fcntl.flock))
    stale = tmp_path / ".x.0123456789abcdef.tmp"
    stale.mkdir()
    write_file(tmp_path / "x", b"1")
    assert stale.exists(), "without locks nobody knows whether its writer lives"
    assert (tmp_path / "x").read_bytes() == b"1"


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "link", "replace", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: bool, force: bool, call: str, code: int
) -> None:
    """The n-th call fails, for every n: OutputFailed, and the old content or the new under the name, nothing else."""
    target, real = tmp_path / "x", getattr(os, call)
    if force:
        target.mkdir() if directory else target.write_bytes(b"old")
    for n in range(100):
        calls = iter(range(1000))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing(code, real, lambda *_: next(calls) == n))  # noqa: B023
            try:
                publish(target, directory=directory, force=force)
                break
            except OutputFailed:
                pass
        assert os.listdir(tmp_path) == (["x"] if force else [])
        assert not force or directory or target.read_bytes() in (b"old", b"new")
    assert n < 99
    assert os.listdir(target) == ["new"] if directory else target.read_bytes() == b"new"


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_an_interruption_as_soon_as_the_folder_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)

    def interrupted(path: object, *rest: object, **named: object) -> object:
        result = real(path, *rest, **named)
        if str(path).endswith(".tmp"):
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        staging.Staging(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
