"""Nothing is visible until it is whole: temporary files beside the destination, fsync, rename, fsync of the directory.

A temporary file is `.NAME.<16 hex digits>.tmp` and is locked (flock) for as long as its writer lives. So a later writer
of the same destination can tell what a killed process left from what another is writing, on any number of hosts that
share locks, and removes only the former.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from statecodec.errors import FormatError, OutputExists, OutputFailed, UsageError
from statecodec.format.container import read_header
from statecodec.limits import Limits

Data: TypeAlias = bytes | memoryview


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, I/O error, no directory, no permission) into OutputFailed."""
    try:
        yield
    except OSError as error:
        raise OutputFailed(f"cannot write {path}: {error.strerror or error}") from error


class TemporaryFile:
    """A new, locked file beside `destination`, with the permissions a new file gets there."""

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        with os_errors(destination):
            self.path, self.fd = self._create()

    def _create(self) -> tuple[Path, int]:
        while True:
            path = self.destination.with_name(f".{self.destination.name}.{secrets.token_hex(8)}.tmp")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with contextlib.suppress(OSError):  # a file system without locks: then nobody can sweep either
                fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return path, fd
            os.close(fd)  # a sweep took it between open and flock

    def write_at(self, data: Data, offset: int) -> None:
        """Write all of `data` at a file offset."""
        view = data if isinstance(data, memoryview) else memoryview(data)
        with os_errors(self.destination):
            while len(view):
                done = os.pwrite(self.fd, view, offset)
                view, offset = view[done:], offset + done

    def finish(self, size: int, mode: int | None) -> None:
        """Set the final size and permissions, and wait until the bytes are on the disk."""
        with os_errors(self.destination):
            os.ftruncate(self.fd, size)
            if mode is not None:
                os.fchmod(self.fd, mode)
            os.fsync(self.fd)

    def publish(self, target: Path, force: bool) -> None:
        """Give the file its name, atomically. Without `force`, a name that appeared meanwhile raises OutputExists."""
        with os_errors(target):
            give_name(self.path, target, force)

    def close(self) -> None:
        """Remove the temporary name, whether published under another or not, and close the file."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):  # what cannot be removed now is swept later
                os.unlink(self.path)
            os.close(self.fd)
            self.fd = -1


def give_name(path: Path, target: Path, force: bool) -> None:
    """Name a finished file, atomically; `path` may remain as a second name. Raises OutputExists and OSError."""
    if force:
        os.replace(path, target)
        return
    try:
        os.link(path, target)
    except FileExistsError:
        raise OutputExists(f"{target} was created meanwhile; use force to replace it") from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        os.rename(path, target)  # no hard links here: the check at the start has to do


def sweep(destination: Path) -> None:
    """Remove temporary files that dead writers of this destination left."""
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.[0-9a-f]{{16}}\.tmp")
    with os_errors(destination):
        names = [name for name in os.listdir(destination.parent) if pattern.fullmatch(name)]
    for name in names:
        path = destination.with_name(name)
        # Not ours to open, locked by a living writer, or gone already: leave it.
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
            finally:
                os.close(fd)


class Destination:
    """Where an output goes: one file at `path`, or numbered shards and an index beside it."""

    def __init__(self, path: str | os.PathLike[str], shards: int, force: bool) -> None:
        self.path = Path(os.path.realpath(path))
        self.force, self.sharded = force, shards > 1
        stem = self.path.name.removesuffix(".safetensors")
        self.index = self.path.with_name(f"{stem}.safetensors.index.json")
        names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        self.files = [self.path.with_name(name) for name in names] if self.sharded else [self.path]
        self._shard = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.safetensors")
        self._check()

    def _check(self) -> None:
        if not self.path.parent.is_dir():
            raise OutputFailed(f"cannot write {self.path}: there is no directory {self.path.parent}")
        for file in (self.path, self.index, *self.files):
            if not os.path.lexists(file):
                continue
            if not file.is_file():
                raise UsageError(f"{file} exists and is not a regular file; it is not replaced")
            if not self.force:
                raise OutputExists(f"{file} exists; use force to replace it")

    def mode(self) -> int | None:
        """Permissions of the file that will be replaced, if there is one: the new file takes them over."""
        for file in (self.path, self.index):
            with contextlib.suppress(FileNotFoundError):
                return stat.S_IMODE(file.stat().st_mode)
        return None

    def publish(self, files: Sequence[TemporaryFile], index: TemporaryFile | None) -> None:
        """Make finished files visible.

        Of a sharded output the index comes last and its predecessor goes first, so that at no moment an index names
        shards of another run.
        """
        shown: list[Path] = []
        try:
            if index is not None and self.force:
                with os_errors(self.index):
                    self.index.unlink(missing_ok=True)
            pairs = [*zip(files, self.files, strict=True), *([(index, self.index)] if index else [])]
            for file, target in pairs:
                file.publish(target, self.force)
                shown.append(target)
            if not self.force:
                self._sync_directory()
        except BaseException:
            for target in shown:
                target.unlink(missing_ok=True)
            raise
        if self.force:  # the new output is whole and the old one gone: from here on nothing is taken back
            self._remove_predecessor()
            self._sync_directory()

    def _remove_predecessor(self) -> None:
        """Remove what an earlier output of this name leaves over: other shards of ours, the index, the single file."""
        keep = {*self.files, self.index} if self.sharded else {self.path}
        with os_errors(self.path):
            shards = [self.path.with_name(n) for n in os.listdir(self.path.parent) if self._shard.fullmatch(n)]
            for file in [self.index, *(f for f in shards if _is_ours(f)), self.path]:
                if file not in keep:
                    file.unlink(missing_ok=True)

    def _sync_directory(self) -> None:
        with os_errors(self.path.parent):
            fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _is_ours(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        read_header(fd, path.name, Limits())
    except FormatError:
        return False
    finally:
        os.close(fd)
    return True
