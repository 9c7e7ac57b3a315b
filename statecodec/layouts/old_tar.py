"""Tar archives of early torch: recognised as torch.load recognises them, never unpacked."""

from __future__ import annotations

import io
import tarfile
from typing import Final

from statecodec.errors import MalformedCheckpoint
from statecodec.files import ByteSource

_MARK: Final = "storages"  # the member that torch unpickles first
_BLOCK: Final = 512
_LONGEST: Final = 1 << 20  # bytes read at once; only headers are read
_MEMBERS: Final = 1000


def is_old_tar(source: ByteSource) -> bool:
    """Whether torch.load would unpickle what is in a tar archive.

    Raises:
        MalformedCheckpoint: If that cannot be told: the archive has too many members, or one with a huge header.
    """
    try:
        tarfile.TarInfo.frombuf(source.read(0, min(_BLOCK, source.size)), "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):  # what nearly every file is
        return False
    try:
        with tarfile.open(fileobj=_File(source), mode="r:") as archive:
            for _ in range(_MEMBERS):
                member = archive.next()
                archive.members = []  # type: ignore[attr-defined]  # else it keeps every one
                if member is None or member.name == _MARK:
                    return member is not None
        raise MalformedCheckpoint(f"a tar archive of more than {_MEMBERS} members")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise MalformedCheckpoint(f"a tar archive that cannot be read: {error}") from error


class _File(io.RawIOBase):
    """A source as `tarfile` takes it."""

    def __init__(self, source: ByteSource) -> None:
        super().__init__()
        self._source, self._at = source, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        if size > _LONGEST:
            raise MalformedCheckpoint(f"a tar archive with a header of {size:,} bytes")
        left = max(self._source.size - self._at, 0)
        data = self._source.read(self._at, min(size if size >= 0 else _LONGEST, left)) if left else b""
        self._at += len(data)
        return data
