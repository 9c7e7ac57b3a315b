"""A file that grows by acknowledged blocks: write, fsync, and only then acknowledge an offset.

Bytes beyond the acknowledged offset do not exist: opening the file cuts them off. That is what makes a kill -9, a power
cut (which may leave zeros there) and an unverified checksummed body harmless.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .storage import BLOCK, fsync_directory


class Spool:
    """Appends to one file from `offset` on, and keeps the SHA-256 of everything before the end of it."""

    def __init__(self, path: Path, offset: int, digest: Any | None) -> None:
        is_new = not path.exists()
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if is_new:
                fsync_directory(path.parent)
            if os.fstat(self._file).st_size < offset:
                raise OSError(5, f"{path.name} is shorter than what was acknowledged")
            os.ftruncate(self._file, offset)
        except BaseException:
            os.close(self._file)
            raise
        self.synced = self.end = offset
        self.digest = digest  # None: not known up to here; the finisher reads the file instead
        self._synced_digest = None if digest is None else digest.copy()

    def write(self, data: bytes) -> None:
        """Append; not durable yet."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, self.end)
            if self.digest is not None:
                self.digest.update(view[:written])
            view, self.end = view[written:], self.end + written

    def sync(self) -> int:
        """Make everything written durable; returns the offset that may be acknowledged."""
        if self.end != self.synced:
            os.fdatasync(self._file) if hasattr(os, "fdatasync") else os.fsync(self._file)
        self.synced = self.end
        self._synced_digest = None if self.digest is None else self.digest.copy()
        return self.synced

    def roll_back(self) -> None:
        """Forget what was written since the last sync, and free its space."""
        os.ftruncate(self._file, self.synced)
        self.end, self.digest = self.synced, None if self._synced_digest is None else self._synced_digest.copy()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def blocks_sha256(blocks: Iterable[bytes]) -> str:
    """SHA-256 of a sequence of blocks, in hex."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return blocks_sha256(iter(lambda: file.read(BLOCK), b""))
