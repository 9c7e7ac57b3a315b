"""The locked folder in which the files of an output are made, and how they get their names.

The folder is `.NAME.<16 hex digits>.tmp`, locked (flock) for as long as its writer lives. So the next writer of the
same destination can tell what a killed process left from what another is writing, on any number of hosts that share
locks, and removes only the former. What a file system cannot do for durability or permissions (sync a folder, change a
mode) is a note, not a failure.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from statecodec.errors import OutputExists, OutputFailed
from statecodec.files import WriteBehind, write_exactly

Data: TypeAlias = bytes | memoryview
Taken: TypeAlias = tuple[Path, Path]  # (where it was moved to, where it was)

_NAME = 50  # characters of the destination's name in the folder's: a file name has at most 255 bytes
_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_REFUSED = (errno.EPERM, errno.EACCES)


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, I/O error, no directory, no permission) into OutputFailed."""
    try:
        yield
    except OSError as error:
        raise OutputFailed(f"cannot write {path}: {error.strerror or error}") from error


class Staging:
    """The locked folder in which the files of one output are made. Close it, whether they were published or not.

    Raises OutputFailed.
    """

    def __init__(self, destination: Path) -> None:
        """Remove what dead writers of this destination left, and make a new folder."""
        self.destination = destination
        self._notes: dict[str, None] = {}
        with os_errors(destination):
            if not destination.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, f"there is no directory {destination.parent}")
            _sweep(destination)
            self.folder, self._lock = _make(destination)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the file system could not do, in words."""
        return tuple(self._notes)

    def sync(self, fd: int) -> None:
        """Wait until an open file's bytes are on the disk. Raises OSError."""
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            self._note("the file system cannot say when data is on the disk: a power failure may lose it", error)

    def sync_folder(self, path: Path) -> None:
        """Make the entries of a folder durable. Raises OSError."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in (*_CANNOT, *_REFUSED):
                raise
            self._note("the file system cannot sync a directory: a power failure may lose the file's name", error)

    def chmod(self, file: int | Path, mode: int) -> None:
        """Set the permissions of a file or folder, open or by its path. Raises OSError.

        It always goes through a descriptor, because a sandbox may forbid changes by path.
        """
        if isinstance(file, Path):
            fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self.chmod(fd, mode)
            finally:
                os.close(fd)
            return
        try:
            os.chmod(file, mode)
        except OSError as error:
            if error.errno not in (*_CANNOT, *_REFUSED):
                raise
            if stat.S_IMODE(os.stat(file).st_mode) != mode:
                self._note(f"the file system does not keep permissions such as {mode:04o}", error)

    def set_time(self, path: Path, mtime_ns: int | None) -> None:
        """Set when a file was last written, if that is known. Raises OSError."""
        try:
            if mtime_ns is not None:
                os.utime(path, ns=(mtime_ns, mtime_ns))
        except OSError as error:
            if error.errno not in (*_CANNOT, *_REFUSED):
                raise
            self._note("the file system does not keep times", error)

    def _note(self, text: str, error: OSError) -> None:
        self._notes[f"{text} ({error.strerror})"] = None

    def publish(self, *targets: Path, force: bool, instead_of: Sequence[Path] = ()) -> None:
        """Move the finished files of these names, in this order, to their places, and make that durable.

        A single file with `force` replaces another atomically. Otherwise the names must be free once the existing files
        among `instead_of`, also in this order, have been moved away; a failure undoes everything. Raises OutputExists,
        OutputFailed.
        """
        with os_errors(targets[-1]):
            if force and len(targets) == 1:
                os.replace(self.folder / targets[0].name, targets[0])
                self.take_away(*(path for path in instead_of if path not in targets))
                self.sync_folder(self.destination.parent)
                return
            taken, shown = self.take_away(*instead_of), list[Path]()
            try:
                for target in targets:
                    self._give_name(target)
                    shown.append(target)
                self.sync_folder(self.destination.parent)
            except BaseException:
                for target in shown:
                    with contextlib.suppress(OSError):
                        os.unlink(target)
                put_back(taken)
                raise

    def publish_folder(self, target: Path, *, force: bool) -> None:
        """Like `publish`, for a directory: with `force` an existing one is moved away first, and back if that fails."""
        folder, named = self.folder / target.name, False
        with os_errors(target):
            taken = self.take_away(target) if force else []
            try:
                self.rename(folder, target)
                named = True
                self.sync_folder(target.parent)
            except BaseException:
                if named:
                    os.rename(target, folder)
                put_back(taken)
                raise

    def _give_name(self, target: Path) -> None:
        try:
            os.link(self.folder / target.name, target)
        except FileExistsError:
            raise OutputExists(f"{target} was created meanwhile; force (--force) replaces it") from None
        except OSError as error:
            if error.errno not in (*_CANNOT, errno.EPERM, errno.EMLINK):
                raise
            self.rename(self.folder / target.name, target)  # no hard links here

    def rename(self, source: Path, target: Path) -> None:
        """Rename to a name that seems to be free. Raises OutputExists, OSError."""
        if os.path.lexists(target):
            raise OutputExists(f"{target} was created meanwhile; force (--force) replaces it")
        os.rename(source, target)

    def take_away(self, *targets: Path) -> list[Taken]:
        """Move the files of these names into the folder, all or none. Raises OSError."""
        taken: list[Taken] = []
        try:
            for target in targets:
                if os.path.lexists(target):
                    away = self.folder / secrets.token_hex(8)
                    os.rename(target, away)
                    taken.append((away, target))
        except BaseException:
            put_back(taken)
            raise
        return taken

    def close(self) -> None:
        """Remove the folder and what is left in it. What cannot be removed now is swept later."""
        if self._lock >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def put_back(taken: list[Taken]) -> None:
    """Undo `take_away`."""
    for away, target in taken:
        os.replace(away, target)


class StagedFile:
    """A file of an output, written at any offsets."""

    def __init__(self, staging: Staging, name: str) -> None:
        self.staging, self.path = staging, staging.folder / name
        with os_errors(staging.destination):
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._behind = WriteBehind(self.fd)

    def write_at(self, data: Data, offset: int) -> None:
        """Write all of `data` at a file offset. Raises OutputFailed."""
        view = data if isinstance(data, memoryview) else memoryview(data)
        with os_errors(self.staging.destination):
            write_exactly(self.fd, offset, view)
        self._behind.wrote(len(view))

    def finish(self, size: int, mode: int | None) -> None:
        """Set the final size and permissions, and wait until the bytes are on the disk. Raises OutputFailed."""
        with os_errors(self.staging.destination):
            os.ftruncate(self.fd, size)
            if mode is not None:
                self.staging.chmod(self.fd, mode)
            self.staging.sync(self.fd)
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _make(destination: Path) -> tuple[Path, int]:
    """A new folder beside the destination, and the descriptor that locks it."""
    while True:
        path = destination.with_name(f".{destination.name[:_NAME]}.{secrets.token_hex(8)}.tmp")
        try:
            os.mkdir(path, 0o700)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # a file system without locks, on which no process can sweep
                fcntl.flock(fd, fcntl.LOCK_EX)
            if path.is_dir():
                return path, fd
            os.close(fd)  # a sweep took it between open and flock
        except FileNotFoundError:
            if not destination.parent.is_dir():
                raise
            # Else a sweep took it between mkdir and open.
        except BaseException:  # Ctrl-C as soon as the folder is there, too
            with contextlib.suppress(OSError):
                os.rmdir(path)
            raise


def _sweep(destination: Path) -> None:
    """Remove the folders that dead writers of this destination left."""
    pattern = re.compile(rf"\.{re.escape(destination.name[:_NAME])}\.[0-9a-f]{{16}}\.tmp")
    for name in os.listdir(destination.parent):
        if pattern.fullmatch(name):
            remove_dead(destination.with_name(name))


def remove_dead(folder: Path) -> None:
    """Remove the folder of a writer that does not live any more.

    A locked one, or one that cannot be opened, is left.
    """
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(fd)
