"""Where a saved checkpoint lies: a directory, or a folder of an fsspec file system or of an obstore store.

The files of ranks have names that no other save uses, and the index comes last and at once. So the only thing asked of
a store is that an object is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

from statecodec.atomic import write_file
from statecodec.distributed.stores import Fsspec, Objects, Obstore
from statecodec.errors import OutputFailed, UsageError
from statecodec.files import LocalFile, RandomAccess
from statecodec.staging import os_errors, remove_dead

StrPath: TypeAlias = "str | os.PathLike[str]"
_LEAST = 1 << 20  # bytes of one request: small tensors lie beside each other


class SaveFolder(Protocol):
    """The folder of one checkpoint; `str()` names it in messages. Writing raises OutputFailed, reading OSError."""

    def make(self) -> None:
        """Make the folder, so that files can be written."""
        ...

    def staged(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write a file to; the file is in the folder when the block is left."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a small file, whole or not at all."""
        ...

    def open(self, name: str) -> RandomAccess:
        """A file, open for reading."""
        ...

    def names(self) -> list[str]:
        """The names of the files that are there."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file."""
        ...


def folder_at(path: StrPath, store: Any = None) -> SaveFolder:
    """The folder that a user means.

    Args:
        path: a directory, a URL, or (with a store) a path in the store.
        store: an fsspec file system, or an obstore store.

    Raises UsageError for a URL that nothing here understands, and for another kind of store.
    """
    import fsspec

    text = os.fspath(path)
    if isinstance(store, fsspec.AbstractFileSystem):
        return InStore(Fsspec(store), store._strip_protocol(text))
    if store is not None:
        if not _is_obstore(store):
            raise UsageError(f"a store is an fsspec file system or an obstore store, found {type(store).__name__}")
        return InStore(Obstore(store), text.strip("/"))
    if "://" not in text:
        return Directory(Path(text))
    if text.startswith("file://"):
        return Directory(Path(unquote(urlsplit(text).path)))
    try:
        system, inside = fsspec.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{text} cannot be opened: {error}. Install what fsspec asks for, or give a store: "
            "store=obstore.store.S3Store(BUCKET), and the path in it"
        ) from error
    return InStore(Fsspec(system), inside)


def _is_obstore(store: object) -> bool:
    if importlib.util.find_spec("obstore") is None:
        return False
    from obstore.store import ObjectStore

    return isinstance(store, ObjectStore)


class Directory:
    """A directory that all ranks see."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Make the directory."""
        with os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """The file's final path: writers of compressed files rename into place once the file is complete."""
        yield self.path / name

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a small file."""
        write_file(self.path / name, data, force=True)

    def open(self, name: str) -> RandomAccess:
        """A file, open for reading."""
        return LocalFile(self.path / name)

    def names(self) -> list[str]:
        """The names of the files that are there."""
        return [path.name for path in self.path.iterdir()]

    def remove(self, name: str) -> None:
        """Remove a file, or the folder in which a killed process was making one."""
        path = self.path / name
        with os_errors(path):
            if path.is_dir():
                remove_dead(path)
            else:
                path.unlink(missing_ok=True)

    def __str__(self) -> str:
        return str(self.path)


class InStore:
    """A folder of a store. What is uploaded is made in the machine's own temporary folder first."""

    def __init__(self, objects: Objects, path: str) -> None:
        self._objects, self._path = objects, path.rstrip("/")

    def _key(self, name: str) -> str:
        return f"{self._path}/{name}" if self._path else name

    def make(self) -> None:
        """Make the folder, so that files can be written."""
        with self._writing("make", ""):
            self._objects.make(self._path)

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """A temporary file, uploaded when the block is left."""
        with tempfile.TemporaryDirectory(prefix="statecodec-") as folder:
            path = Path(folder) / name
            yield path
            with self._writing("write", name):
                self._objects.upload(path, self._key(name))

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a small file, at once."""
        with self._writing("write", name):
            self._objects.replace(self._key(name), data)

    def open(self, name: str) -> RandomAccess:
        """A file, read by ranges."""
        with _os_errors():
            return _Ranges(self._objects, self._key(name))

    def names(self) -> list[str]:
        """The names of the files that are there."""
        with _os_errors():
            return self._objects.names(self._path)

    def remove(self, name: str) -> None:
        """Remove a file."""
        with self._writing("remove", name):
            self._objects.remove(self._key(name))

    @contextlib.contextmanager
    def _writing(self, doing: str, name: str) -> Iterator[None]:
        try:
            with _os_errors():
                yield
        except OSError as error:
            where = f"{self}/{name}" if name else str(self)
            raise OutputFailed(f"cannot {doing} {where}: {error.strerror or error}") from error

    def __str__(self) -> str:
        return f"{self._objects}{self._path}"


class _Ranges:
    """An object that is read by ranges; the range read last is kept."""

    def __init__(self, objects: Objects, key: str) -> None:
        self._objects, self._key = objects, key
        self.size = objects.size(key)
        self._last = (0, b"")

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target`. Raises EOFError past the end, OSError."""
        stop = offset + len(target)
        if stop > self.size:
            raise EOFError
        start, data = self._last
        if offset < start or stop > start + len(data):
            start = offset
            with _os_errors():
                data = self._objects.read(self._key, start, min(max(stop, start + _LEAST), self.size))
            self._last = start, data
        if stop > start + len(data):
            raise EOFError
        target[:] = data[offset - start : stop - start]

    def close(self) -> None:
        """Drop the range that is kept."""
        self._last = (0, b"")


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Turn whatever the library of a store raises into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
