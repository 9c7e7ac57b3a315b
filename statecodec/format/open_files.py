"""The files of an output, open for reading; their errors become FormatError."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from statecodec.errors import CorruptFile, FormatError
from statecodec.files import LocalFile, RandomAccess, read_bytes
from statecodec.format.container import MANIFEST_ENTRY, Header, read_header
from statecodec.limits import Limits

OpenFile: TypeAlias = Callable[[Path], RandomAccess]
"""How a file is opened. Raises OSError, ValueError."""


class OpenFiles:
    """Numbered by shard. Raises FormatError and its subclasses only."""

    def __init__(self, open_file: OpenFile = LocalFile) -> None:
        self.local = open_file is LocalFile
        self._open_file = open_file
        self._files: list[RandomAccess] = []
        self._finalizer = weakref.finalize(self, _close_all, self._files)

    @property
    def sizes(self) -> list[int]:
        """Bytes of every file."""
        return [file.size for file in self._files]

    def open_shard(self, path: Path, limits: Limits) -> Header:
        """Open the next shard, and read its header."""
        file = self._opened(path)
        self._files.append(file)
        with _reading(f"{path.name}: "):
            return read_header(file, path.name, limits)

    def last_is_first(self) -> None:
        """Number the shards anew: the file that was opened first is the last shard."""
        self._files.append(self._files.pop(0))

    def read_into(self, shard: int, offset: int, target: memoryview) -> None:
        """Fill `target` from a shard."""
        with _reading():
            self._files[shard].read_into(offset, target)

    def content(self, path: Path, limits: Limits) -> bytes:
        """All of a small file, which stays closed."""
        with contextlib.closing(self._opened(path)) as file, _reading(f"{path.name}: "):
            limits.check(f"{path.name}: bytes", file.size, limits.max_manifest_bytes)
            return bytes(read_bytes(file, 0, file.size))

    def manifest(self, shard: int, header: Header, name: str, limits: Limits) -> bytes | None:
        """The manifest's bytes, without checking their checksum; None if the shard has none."""
        entry = header.entries.get(MANIFEST_ENTRY)
        if entry is None:
            return None
        limits.check(f"{name}: manifest bytes", entry.stop - entry.start, limits.max_manifest_bytes)
        with _reading():
            return bytes(read_bytes(self._files[shard], header.data + entry.start, entry.stop - entry.start))

    def _opened(self, path: Path) -> RandomAccess:
        try:
            return self._open_file(path)
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error

    def close(self) -> None:
        """Close all files."""
        self._finalizer()


@contextlib.contextmanager
def _reading(where: str = "") -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise CorruptFile(f"{where}the file ends early: it was truncated") from error
    except OSError as error:
        raise FormatError(f"{where}cannot read: {error.strerror or error}") from error


def _close_all(files: list[RandomAccess]) -> None:
    while files:
        with contextlib.suppress(OSError):
            files.pop().close()
