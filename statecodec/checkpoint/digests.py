"""SHA-256 of whole files, computed on a thread while the conversion runs."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from statecodec.checkpoint.shared_reads import SharedReads
from statecodec.files import opened, read_exactly

_BLOCK = 4 << 20


@dataclass(frozen=True)
class FileToHash:
    """A file to read once, from its start; `number` is that of the file in the source whose reads are shared."""

    path: Path
    nbytes: int
    number: int = 0


class FileHashes(threading.Thread):
    """Hashes files, one after the other, holding no more than one block.

    Where a conversion's reads are shared, it hashes the buffers that it is lent, and reads only what is in none of
    them. A file that is still being written is hashed up to where `advance` says that it is complete.
    """

    def __init__(
        self, files: Sequence[FileToHash], *, growing: bool = False, shared: SharedReads | None = None
    ) -> None:
        """With `growing`, nothing is read before `advance` allows it (one file only)."""
        super().__init__(name="statecodec-digests", daemon=True)
        self.files, self._shared = files, shared
        self._digests: list[str] = []
        self._error: BaseException | None = None
        self._stopped = False
        self._readable = 0 if growing else sum(file.nbytes for file in files)
        self._changed = threading.Condition()
        self._block = memoryview(bytearray(_BLOCK if self.files else 0))

    def run(self) -> None:
        try:
            for file in self.files:
                self._digests.append(self._hash(file))
        except BaseException as error:  # raised again by `digests`
            self._error = error

    def advance(self, nbytes: int) -> None:
        """The first `nbytes` bytes of the growing file will not change any more."""
        with self._changed:
            self._readable = max(self._readable, nbytes)
            self._changed.notify()

    def cancel(self) -> None:
        """Stop at the next block. `digests` must not be called after that."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._nothing_more()

    def _nothing_more(self) -> None:
        if self._shared is not None:
            self._shared.close()

    def digests(self) -> list[str]:
        """SHA-256 of each file in hexadecimal, once the thread is done.

        Raises:
            MalformedCheckpoint: If a file is shorter than it was.
            OSError: If a file cannot be read.
        """
        self._nothing_more()
        self.join()
        if self._error is not None:
            raise self._error
        return self._digests

    def _hash(self, file: FileToHash) -> str:
        sha, offset = hashlib.sha256(), 0
        # The file that is encoded, even if another one has its name by now.
        with self._opened(file) as fd:
            while offset < file.nbytes and not self._stopped:
                with self._piece(file, fd, offset) as piece:
                    sha.update(piece)
                    offset += len(piece)
        return sha.hexdigest()

    @contextmanager
    def _opened(self, file: FileToHash) -> Iterator[int]:
        if self._shared is not None:
            with self._shared.open(file.number) as fd:
                yield fd
        else:
            with opened(file.path) as source:
                yield source.fd

    @contextmanager
    def _piece(self, file: FileToHash, fd: int, offset: int) -> Iterator[memoryview]:
        """The next bytes of a file, lent or read; none after `cancel`."""
        lent = self._shared.take(file.number, offset) if self._shared is not None else file.nbytes
        if self._shared is not None and not isinstance(lent, int):
            try:
                yield lent.data[offset - lent.start :]
            finally:
                self._shared.give_back(lent)
            return
        assert isinstance(lent, int)
        piece = self._block[: min(_BLOCK, lent - offset)]
        if not self._wait_until(offset + len(piece)):
            yield piece[:0]
            return
        read_exactly(fd, offset, piece, str(file.path))
        yield piece

    def _wait_until(self, readable: int) -> bool:
        """Block until so many bytes may be read; False after `cancel`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._readable >= readable)
        return not self._stopped
