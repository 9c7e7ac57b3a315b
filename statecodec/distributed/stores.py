"""fsspec and obstore, two libraries for object stores and remote file systems, behind one interface."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_PART = 16 << 20  # bytes of one part of an upload


class Objects(Protocol):
    """A store. Every method raises the errors of its library."""

    def make(self, folder: str) -> None:
        """Make a folder, where there are folders."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """Copy a local file to a key that does not exist yet."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Write an object atomically: readers find the old or the new one."""
        ...

    def size(self, key: str) -> int:
        """Bytes of an object."""
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Some bytes of an object."""
        ...

    def names(self, folder: str) -> list[str]:
        """The names of the files directly in a folder."""
        ...

    def remove(self, key: str) -> None:
        """Remove an object."""
        ...


class Fsspec:
    """A file system of fsspec. Its listings are never taken from a cache, because other ranks write as well."""

    def __init__(self, system: AbstractFileSystem) -> None:
        self._system: Any = system

    def make(self, folder: str) -> None:
        self._system.makedirs(folder, exist_ok=True)

    def upload(self, path: Path, key: str) -> None:
        self._system.put_file(str(path), key)

    def replace(self, key: str, data: bytes) -> None:
        """Write an object by a move: a file system that is no object store would show it half-written."""
        from fsspec import AbstractFileSystem

        temporary = f"{key}.{secrets.token_hex(8)}.tmp"
        self._system.pipe_file(temporary, data)
        if type(self._system).mv is AbstractFileSystem.mv:  # the default `mv` takes keys for patterns
            self._system.cp_file(temporary, key)
            self._system.rm_file(temporary)
        else:
            self._system.mv(temporary, key)

    def size(self, key: str) -> int:
        self._system.invalidate_cache()
        return int(self._system.size(key))

    def read(self, key: str, start: int, stop: int) -> bytes:
        return bytes(self._system.cat_file(key, start=start, end=stop))

    def names(self, folder: str) -> list[str]:
        self._system.invalidate_cache()
        return [path.rstrip("/").rpartition("/")[2] for path in self._system.ls(folder, detail=False)]

    def remove(self, key: str) -> None:
        self._system.rm_file(key)

    def __str__(self) -> str:
        protocol = self._system.protocol
        return f"{protocol if isinstance(protocol, str) else protocol[0]}://"


class Obstore:
    """A store of obstore."""

    def __init__(self, store: Any) -> None:
        import obstore

        self._store, self._library = store, obstore

    def make(self, folder: str) -> None:
        """Do nothing: an object store has no folders."""

    def upload(self, path: Path, key: str) -> None:
        with path.open("rb") as file:
            self._library.put(self._store, key, file, chunk_size=_PART)

    def replace(self, key: str, data: bytes) -> None:
        self._library.put(self._store, key, data)

    def size(self, key: str) -> int:
        return int(self._library.head(self._store, key)["size"])

    def read(self, key: str, start: int, stop: int) -> bytes:
        return bytes(self._library.get_range(self._store, key, start=start, end=stop))

    def names(self, folder: str) -> list[str]:
        objects = self._library.list_with_delimiter(self._store, prefix=folder or None)["objects"]
        return [item["path"].rpartition("/")[2] for item in objects]

    def remove(self, key: str) -> None:
        self._library.delete(self._store, key)

    def __str__(self) -> str:
        return f"{type(self._store).__name__}:"
