"""Reading and writing files exactly, and telling whether a file is still the one that was opened.

Nothing here knows what is in a file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from statecodec.errors import LayoutError, MalformedCheckpoint, UnknownLayout

_BEHIND = 16 << 20  # bytes that wait in memory before the disk is told of them
_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True)
class Identity:
    """What tells one state of a file from another: a replaced file has another inode, a changed one another time."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """The identity that a stat result states."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, status: os.stat_result, name: str) -> None:
        """Raise LayoutError if a stat result is of another file, or of this file in another state."""
        if Identity.of(status) != self:
            raise LayoutError(f"{name} was changed or replaced while it was read; try again once it is complete")


IN_MEMORY = Identity(0, 0, 0, 0)
"""Of bytes that are no file's."""


class ByteSource(Protocol):
    """Random access to the bytes of a file, or to the skeleton of a compressed one."""

    @property
    def size(self) -> int:
        """Bytes in the file."""
        ...

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`. Raises MalformedCheckpoint past the end."""
        ...


class FileBytes:
    """A ByteSource over an open file descriptor, which it does not own.

    Args:
        fd: Open for reading, of a regular file.
        name: What messages call the file.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.fd, self.name = fd, name
        status = os.fstat(fd)
        self.size, self.mode = status.st_size, stat.S_IMODE(status.st_mode)
        self.identity = Identity.of(status)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`. Raises MalformedCheckpoint past the end."""
        _check_range(self, self.name, offset, nbytes)
        data = os.pread(self.fd, nbytes, offset)
        if len(data) == nbytes:
            return data
        target = bytearray(data).ljust(nbytes)
        read_exactly(self.fd, offset + len(data), memoryview(target)[len(data) :], self.name)
        return bytes(target)


class MemoryBytes:
    """A ByteSource over bytes in memory."""

    def __init__(self, data: bytes, name: str = "checkpoint") -> None:
        self.data, self.name, self.size = data, name, len(data)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`. Raises MalformedCheckpoint past the end."""
        _check_range(self, self.name, offset, nbytes)
        return self.data[offset : offset + nbytes]


class PartOfBytes:
    """A ByteSource over `nbytes` bytes of another one, from `start` on. The other one checks that they are there."""

    def __init__(self, whole: ByteSource, start: int, nbytes: int, name: str) -> None:
        self.whole, self.start, self.size, self.name = whole, start, nbytes, name

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`. Raises MalformedCheckpoint past the end."""
        _check_range(self, self.name, offset, nbytes)
        return self.whole.read(self.start + offset, nbytes)


class RandomAccess(Protocol):
    """A file that is open for reading, wherever it lies."""

    @property
    def size(self) -> int:
        """Bytes in the file."""
        ...

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes). Raises EOFError past the end, OSError."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def read_bytes(file: RandomAccess, offset: int, nbytes: int) -> bytearray:
    """Some bytes of a file. Raises EOFError past the end, OSError."""
    data = bytearray(nbytes)
    file.read_into(offset, memoryview(data))
    return data


class LocalFile:
    """A regular file of this machine, open for reading; never waits for a pipe or a device. Raises OSError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise OSError(errno.EINVAL, "not a regular file")

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes). Raises EOFError past the end, OSError."""
        _fill(self._fd, offset, target)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _check_range(source: ByteSource, name: str, offset: int, nbytes: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > source.size:
        raise MalformedCheckpoint(
            f"{name}: needs bytes {offset}..{offset + nbytes} but the file has {source.size}; it is truncated"
        )


@contextmanager
def opened(
    path: str | os.PathLike[str], name: str = "", *, follow: bool = True, expected: Identity | None = None
) -> Iterator[FileBytes]:
    """Open a regular file for reading, never waiting for one that is a pipe or a device.

    Args:
        path: Where the file is.
        name: What messages call it; by default its base name.
        follow: Whether the path itself may be a symbolic link.
        expected: The identity that the file must still have.

    Raises:
        UnknownLayout: It is not a regular file.
        LayoutError: It has another identity than `expected`.
        OSError: It cannot be opened.
    """
    name = name or Path(path).name
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(path, flags)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UnknownLayout(f"{name} is not a regular file")
        if expected is not None:
            expected.check(status, name)
        yield FileBytes(fd, name)
    finally:
        os.close(fd)


def read_exactly(fd: int, offset: int, target: memoryview, name: str) -> None:
    """Fill `target` (bytes) from a file. Raises MalformedCheckpoint if the file is shorter."""
    try:
        _fill(fd, offset, target)
    except EOFError as error:
        raise MalformedCheckpoint(f"{name}: ends at byte {error}; the file shrank while it was read") from None


def _fill(fd: int, offset: int, target: memoryview) -> None:
    """Raises EOFError with the byte at which the file ends."""
    while len(target):
        count = os.preadv(fd, [target], offset)
        if count == 0:
            raise EOFError(offset)
        target, offset = target[count:], offset + count


def will_need(fd: int, offsets: Iterable[int], nbytes: int) -> None:
    """Have the disk fetch pieces of a file all at once, which are read one by one then; nothing where it cannot."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            for offset in offsets:
                os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


def write_exactly(fd: int, offset: int, data: memoryview) -> None:
    """Write all of `data` at an offset."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def reserve(fd: int, nbytes: int) -> bool:
    """Give a file its size, and room on the disk where the file system can; whether it has that. Raises OSError.

    Writing then costs less, and a full disk shows before the work is done.
    """
    os.ftruncate(fd, nbytes)
    # Python's os.posix_fallocate writes to every block where a file system does not have it.
    fallocate = _system_call("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
    if fallocate is None or not nbytes:
        return not nbytes
    if fallocate(fd, 0, 0, nbytes) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(code, os.strerror(code))
    return False


class WriteBehind:
    """Has the disk write a file's bytes while more are made, so that fsync has little left to wait for at the end.

    Where the system cannot, nothing happens, and fsync writes them.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._waiting = fd, 0

    def wrote(self, nbytes: int) -> None:
        """So many bytes more have been written to the file."""
        self._waiting += nbytes
        if self._waiting < _BEHIND:
            return
        self._waiting = 0
        start = _system_call("sync_file_range", ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_uint)
        if start is not None:
            start(self._fd, 0, 0, _SYNC_FILE_RANGE_WRITE)  # what goes wrong here goes wrong again in fsync


@cache
def _system_call(name: str, *arguments: Any) -> Callable[..., int] | None:
    """A function of the C library that Python does not have; None on a system without it."""
    try:
        function: Any = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError):
        return None
    function.argtypes = arguments
    call: Callable[..., int] = function
    return call
