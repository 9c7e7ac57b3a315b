"""SHA-256 and zip CRCs of whole files, computed on a thread while the conversion runs."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zlib_ng import zlib_ng

from statecodec.checkpoint.shared_reads import SharedReads
from statecodec.checkpoint.source_files import check_crc
from statecodec.files import opened, read_exactly
from statecodec.layouts import Crc32

_BLOCK = 4 << 20


@dataclass(frozen=True)
class FileToHash:
    """A file to read once, from its start.

    `crcs` are zip CRCs that must hold (torch.load itself never checks them); `number` is that of the file in the source
    whose reads are shared.
    """

    path: Path
    nbytes: int
    crcs: tuple[Crc32, ...] = ()
    number: int = 0


class FileHashes(threading.Thread):
    """Hashes files, one after the other, and checks their CRCs, holding no more than one block.

    Where a conversion's reads are shared, it hashes the buffers that it is lent, and reads only what is in none of
    them. A file that is still being written is hashed up to where `advance` says that it is complete.
    """

    def __init__(
        self,
        files: Sequence[FileToHash],
        *,
        sha256: bool = True,
        growing: bool = False,
        shared: SharedReads | None = None,
    ) -> None:
        """With `growing`, nothing is read before `advance` allows it (one file only)."""
        super().__init__(name="statecodec-digests", daemon=True)
        self.files = [file for file in files if sha256 or file.crcs]
        self._sha256, self._shared = sha256, shared
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
        """SHA-256 of each file in hexadecimal (none without `sha256`), once the thread is done.

        Raises:
            MalformedCheckpoint: If a CRC does not hold.
            OSError: If a file cannot be read.
        """
        self._nothing_more()
        self.join()
        if self._error is not None:
            raise self._error
        return self._digests if self._sha256 else []

    def _hash(self, file: FileToHash) -> str:
        sha, crcs, offset = hashlib.sha256(), _CrcCheck(file), 0
        # The file that is encoded, even if another one has its name by now.
        with self._opened(file) as fd:
            while offset < file.nbytes and not self._stopped:
                with self._piece(file, fd, offset) as piece:
                    if self._sha256:
                        sha.update(piece)
                    crcs.feed(fd, offset, piece)
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


class _CrcCheck:
    """Compares the CRCs of a file's disjoint spans with what the file says, while it is read from start to end."""

    def __init__(self, file: FileToHash) -> None:
        self._path = file.path
        self._spans = sorted((c for c in file.crcs if c.nbytes), key=lambda c: -c.offset)
        self._value = 0

    def feed(self, fd: int, start: int, data: memoryview) -> None:
        """File bytes from `start` are `data`, which follows what came before."""
        stop = start + len(data)
        while self._spans and self._spans[-1].offset < stop:
            span = self._spans[-1]
            end = span.offset + span.nbytes
            self._value = zlib_ng.crc32(data[max(span.offset - start, 0) : end - start], self._value)
            if end > stop:
                return
            check_crc(fd, span, self._value, str(self._path))
            self._spans.pop()
            self._value = 0
