"""The files of an uncompressed checkpoint: opened when needed, checked to be the same files, records checked once."""

from __future__ import annotations

import os
import struct
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from contextlib import AbstractContextManager
from pathlib import Path

from zlib_ng import zlib_ng

from statecodec.errors import LayoutError, MalformedCheckpoint
from statecodec.files import Identity, read_exactly
from statecodec.layouts import Crc32, Source

_OPEN_FILES = 64  # descriptors kept; a directory may have more files than a process may open
_BLOCK = 1 << 20


class SourceFiles:
    """Descriptors of a located checkpoint's files. Thread-safe."""

    def __init__(self, source: Source) -> None:
        root = source.root
        self._paths = [root / f.path if source.is_directory else root for f in source.files]
        self._identities = [f.identity for f in source.files]
        self._fds: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, file: int) -> Path:
        """The path of a file."""
        return self._paths[file]

    def open(self, file: int) -> AbstractContextManager[int]:
        """A descriptor of a file for a `with` block. Raises LayoutError if it is not the file that was located."""
        with self._lock:
            held = self._fds.get(file)
            if held is None:
                held = self._fds[file] = _Descriptor(self._opened(file), self._lock)
            self._fds.move_to_end(file)
            held.users += 1
            if len(self._fds) > _OPEN_FILES:
                self._close_idle()
        return held

    def _close_idle(self) -> None:
        idle = [file for file, held in self._fds.items() if not held.users]
        for file in idle[: len(self._fds) - _OPEN_FILES]:
            os.close(self._fds.pop(file).fd)

    def _opened(self, file: int) -> int:
        path = self.path(file)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise LayoutError(f"{path} cannot be read any more: {error.strerror}") from error
        if Identity.of(os.fstat(fd)) != self._identities[file]:
            os.close(fd)
            raise _changed(path)
        return fd

    def check_unchanged(self) -> None:
        """Raise LayoutError if a file was written to or replaced since it was located."""
        for file, identity in enumerate(self._identities):
            path = self.path(file)
            try:
                identity_now = Identity.of(os.stat(path))
            except OSError:
                raise _changed(path) from None
            if identity_now != identity:
                raise _changed(path)

    def close(self) -> None:
        """Close all descriptors."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1].fd)


class _Descriptor:
    """In use from `SourceFiles.open` until the `with` block ends."""

    def __init__(self, fd: int, lock: threading.Lock) -> None:
        self.fd, self.users, self._lock = fd, 0, lock

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.users -= 1


def _changed(path: Path) -> LayoutError:
    return LayoutError(f"{path} changed while it was being read; try again once it is complete")


class SpanCheck:
    """Compares each zip record with its CRC-32 once, before numbers are taken from it. Thread-safe."""

    def __init__(self, source: Source, files: SourceFiles) -> None:
        self._files = files
        self._spans = [sorted((c for c in f.crcs if c.nbytes), key=lambda c: c.offset) for f in source.files]
        self._starts = [[c.offset for c in spans] for spans in self._spans]
        self._sound: set[tuple[int, int]] = set()

    def range(self, file: int, start: int, stop: int) -> None:
        """Check the records that have bytes in this range of a file. Raises MalformedCheckpoint."""
        starts = self._starts[file]
        for i in range(max(bisect_right(starts, start) - 1, 0), bisect_left(starts, stop)):
            self._check(file, i)

    def whole(self, file: int) -> None:
        """Check every record of a file. Raises MalformedCheckpoint."""
        for i in range(len(self._spans[file])):
            self._check(file, i)

    def _check(self, file: int, number: int) -> None:
        if (file, number) in self._sound:
            return
        span, path = self._spans[file][number], str(self._files.path(file))
        with self._files.open(file) as fd:
            block, value, end = memoryview(bytearray(min(_BLOCK, span.nbytes))), 0, span.offset + span.nbytes
            for offset in range(span.offset, end, _BLOCK):
                piece = block[: min(_BLOCK, end - offset)]
                read_exactly(fd, offset, piece, path)
                value = zlib_ng.crc32(piece, value)
            check_crc(fd, span, value, path)
        self._sound.add((file, number))


def check_crc(fd: int, span: Crc32, crc: int, name: str) -> None:
    """Compare the CRC-32 of a span with what the file says. Raises MalformedCheckpoint."""
    stored = bytearray(4)
    read_exactly(fd, span.at[0], memoryview(stored), name)
    (expected,) = struct.unpack("<I", stored)
    if crc != expected:
        raise MalformedCheckpoint(
            f"{name} is damaged: bytes {span.offset}..{span.offset + span.nbytes} have CRC-32 {crc:08x}, the file "
            f"says {expected:08x} (torch.load does not check this)"
        )
