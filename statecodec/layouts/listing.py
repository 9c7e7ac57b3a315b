"""The files that a checkpoint consists of, before anybody looks into them: names, sizes, modes, and first bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Final

from statecodec.errors import UnknownLayout
from statecodec.files import IN_MEMORY, ByteSource, Identity, MemoryBytes, opened
from statecodec.layouts.base import Folder
from statecodec.names import shown

MAGIC: Final = 16
HEAD: Final = 2048
_MAX_FILES: Final = 200_000
_MAX_DEPTH: Final = 64


class ListedFile:
    """One file of a listing. It is opened when it is read; `open` inside `open` uses the same descriptor.

    Args:
        path: Relative posix path.
        nbytes: Its size.
        open_bytes: Opens its bytes.
        mode: Its permission bits.
        identity: What the file was when it was listed.
        layout: `opaque` for a file that was carried as bytes before, and is not to be looked into.
    """

    def __init__(
        self,
        path: str,
        nbytes: int,
        open_bytes: Callable[[], AbstractContextManager[ByteSource]],
        *,
        mode: int = 0o644,
        identity: Identity = IN_MEMORY,
        layout: str | None = None,
    ) -> None:
        """`layout`: "opaque" for a file that was carried as bytes before, and is not to be looked into."""
        self.path, self.nbytes, self.mode, self.identity, self.layout = path, nbytes, mode, identity, layout
        self._open_bytes = open_bytes
        self._held: ByteSource | None = None

    @contextmanager
    def open(self) -> Iterator[ByteSource]:
        """Open the file's bytes for a `with` block.

        Yields:
            The bytes.

        Raises:
            LayoutError: If it is not the file any more that was listed.
        """
        if self._held is not None:
            yield self._held
            return
        with self._open_bytes() as source:
            self._held = source
            try:
                yield source
            finally:
                self._held = None

    @cached_property
    def magic(self) -> bytes:
        """The first bytes, as many as tell which format a file has: less than it takes to reach any numbers."""
        with self.open() as source:
            return source.read(0, min(MAGIC, self.nbytes))

    @cached_property
    def head(self) -> bytes:
        """The first bytes, up to HEAD of them."""
        with self.open() as source:
            return source.read(0, min(HEAD, self.nbytes))


@dataclass(frozen=True)
class Listing:
    """Files by path, sorted, and the folder that is looked at.

    Args:
        files: Path -> file, without hard links to others.
        is_directory: Whether the checkpoint is a directory.
        folders: The directory itself and all subdirectories.
        same_as: Hard links: path -> path of the file that it is the same as.
        folder: The folder that is looked at; "" for the checkpoint's own.
    """

    files: Mapping[str, ListedFile]
    is_directory: bool
    folders: tuple[Folder, ...] = ()
    same_as: Mapping[str, str] | None = None
    folder: str = ""

    @property
    def only(self) -> ListedFile | None:
        """The file, if there is just one."""
        return next(iter(self.files.values())) if len(self.files) == 1 else None

    def get(self, name: str) -> ListedFile | None:
        """Look up a file in the folder.

        Args:
            name: Its path inside the folder.

        Returns:
            The file; None if there is none.
        """
        return self.files.get(f"{self.folder}/{name}" if self.folder else name)

    def prefix(self, path: str) -> str:
        """What the names of a file's tensors begin with.

        Args:
            path: The path of the file, or of the subfolder.

        Returns:
            In a directory the path and a colon; else "".
        """
        return f"{shown(path)}:" if self.is_directory and path else ""

    def of(self, paths: Iterable[str], folder: str | None = None) -> Listing:
        """Narrow the listing to some of its files.

        Args:
            paths: Their paths, sorted.
            folder: The folder that is then looked at; by default the same.

        Returns:
            A listing of these files.
        """
        files = {path: self.files[path] for path in paths}
        return replace(self, files=files, folder=self.folder if folder is None else folder)


def list_path(path: str | os.PathLike[str]) -> Listing:
    """List a file or a directory.

    Args:
        path: Its path.

    Returns:
        The listing; files are opened when they are read.

    Raises:
        UnknownLayout: If it is neither a file nor a directory, or holds what cannot be carried: symbolic links,
            devices, too many files.
        OSError: If it cannot be read.
    """
    root = Path(path)
    status = root.stat()  # the path that the user gave may itself be a symbolic link
    if stat.S_ISDIR(status.st_mode):
        return _list_directory(root)
    if not stat.S_ISREG(status.st_mode):
        raise UnknownLayout(f"{root} is neither a file nor a directory")
    return Listing({root.name: _listed(root, root.name, status, follow=True)}, is_directory=False)


def list_memory(files: Mapping[str, bytes], *, is_directory: bool = False) -> Listing:
    """List bytes in memory as if they were files.

    Args:
        files: Path -> content.
        is_directory: Whether they stand for a directory.

    Returns:
        The listing.
    """
    listed = {
        path: ListedFile(path, len(data), partial(_in_memory, MemoryBytes(data, path)))
        for path, data in sorted(files.items())
    }
    return Listing(listed, is_directory)


def _in_memory(source: ByteSource) -> AbstractContextManager[ByteSource]:
    return nullcontext(source)


def _listed(where: Path, path: str, status: os.stat_result, *, follow: bool) -> ListedFile:
    identity = Identity.of(status)
    return ListedFile(
        path,
        status.st_size,
        partial(opened, where, path, follow=follow, expected=identity),
        mode=stat.S_IMODE(status.st_mode),
        identity=identity,
    )


def _list_directory(root: Path) -> Listing:
    """List a directory without recursion. No link is followed."""
    files: list[ListedFile] = []
    folders: list[Folder] = []
    pending = [""]
    while pending:
        folder = pending.pop()
        if folder.count("/") >= _MAX_DEPTH:
            raise UnknownLayout(f"{folder} is nested deeper than {_MAX_DEPTH} folders")
        status = (root / folder).stat()
        folders.append(Folder(folder, stat.S_IMODE(status.st_mode), status.st_mtime_ns))
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_symlink():
                    raise UnknownLayout(
                        f"{path} is a symbolic link; leave it out, or make a copy with what it points to (cp -rL)"
                    )
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                elif entry.is_file(follow_symlinks=False):
                    files.append(_listed(root / path, path, entry.stat(follow_symlinks=False), follow=False))
                else:
                    raise UnknownLayout(f"{path} is a device, socket or pipe, not a file")
                if len(files) + len(folders) + len(pending) > _MAX_FILES:
                    raise UnknownLayout(f"holds more than {_MAX_FILES} files; pack its subdirectories one by one")
    if not files:
        raise UnknownLayout("the directory holds no file")
    first: dict[tuple[int, int], str] = {}
    by_path: dict[str, ListedFile] = {}
    same_as: dict[str, str] = {}
    for file in sorted(files, key=lambda f: f.path):
        original = first.setdefault((file.identity.device, file.identity.inode), file.path)
        if original == file.path:
            by_path[file.path] = file
        else:
            same_as[file.path] = original
    return Listing(by_path, True, tuple(sorted(folders, key=lambda f: f.path)), same_as)
