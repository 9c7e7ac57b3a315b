"""What loading a checkpoint with its own framework would import, found without loading it.

Every file is judged by its content, not by its name or by the layout that claims it: archives of torch.save, bare
pickles of any protocol, several one after the other (torch before 1.6), tar archives of early torch, `.metadata` and
the items of DCP. What may be a pickle and cannot be read is reported as such. Pickles inside compressed files, other
tar archives and numpy archives are not looked for: no framework loads those by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Final

from statecodec.errors import FormatError, LayoutError
from statecodec.files import ByteSource, PartOfBytes
from statecodec.layouts import dcp
from statecodec.layouts.collecting import collector_paused
from statecodec.layouts.dcp_index import DcpItem, read_index
from statecodec.layouts.listing import HEAD, ListedFile, Listing
from statecodec.layouts.old_tar import is_old_tar
from statecodec.layouts.pickle.imports import Imports, imports
from statecodec.layouts.pickle.reader import MAX_PICKLE_BYTES
from statecodec.layouts.registry import claimed
from statecodec.layouts.safetensors_file import is_safetensors
from statecodec.layouts.torch_zip import is_zip
from statecodec.layouts.zip_reader import read_checked, read_entries

_PREFIXES: Final = (64, HEAD, 1 << 20, 32 << 20)
_MAX_NAMES: Final = 1000
_MAX_STREAMS: Final = 1000
_PROGRAMS: Final = ("/code/", "/archive_format")


@dataclass(frozen=True)
class FileImports:
    """What unpickling what is in one file would import."""

    path: str
    """Of the file, as in the listing."""
    names: frozenset[tuple[str, str]] = frozenset()
    """Module and name of every global."""
    unread: str | None = None
    """Why some of it cannot be told."""

    def __or__(self, other: FileImports | None) -> FileImports:
        if other is None:
            return self
        return FileImports(self.path, self.names | other.names, self.unread or other.unread)


@collector_paused()
def file_imports(listing: Listing) -> Iterator[FileImports]:
    """For every file that holds a pickle, by path; nothing is run. Raises OSError."""
    by_path: dict[str, FileImports] = {}
    for layout, part in claimed(listing):
        for path, file in part.files.items():
            # A shard of DCP is a row of archives, of which each item is looked at; any other bytes are no shard.
            if layout is not dcp or not path.endswith(dcp.SHARD) or not is_zip(file.magic[:4]):
                _add(by_path, _of_file(file))
        if layout is dcp:
            _add_shards(by_path, part)
    for path in sorted(by_path):
        yield _bounded(by_path[path])


def _add(by_path: dict[str, FileImports], more: FileImports | None) -> None:
    if more is not None:
        by_path[more.path] = more | by_path.get(more.path)


def _bounded(imported: FileImports) -> FileImports:
    if len(imported.names) <= _MAX_NAMES:
        return imported
    first = frozenset(sorted(imported.names)[:_MAX_NAMES])
    return replace(imported, names=first, unread=f"names {len(imported.names)} globals; no checkpoint does")


def _of_file(file: ListedFile) -> FileImports | None:
    try:
        with file.open() as source:
            if is_safetensors(file.magic, file.nbytes):
                return _of_bytes(source, file.path, sure=False)
            if is_old_tar(source):
                return FileImports(
                    file.path, unread="a torch file from before torch 1.6, which cannot be read as a whole"
                )
            return _of_bytes(source, file.path)
    except (LayoutError, FormatError) as error:
        return FileImports(file.path, unread=str(error))


def _add_shards(by_path: dict[str, FileImports], part: Listing) -> None:
    """Find what the shards that `.metadata` names hold."""
    try:
        items = read_index(part).items
    except (LayoutError, FormatError) as error:
        for path in part.files:
            _add(by_path, FileImports(path, unread=f"where its items lie cannot be told: {error}"))
        return
    for path, inside in groupby(items, attrgetter("file")):
        with part.files[path].open() as source:
            for item in inside:
                _add(by_path, _of_item(item, source))


def _of_item(item: DcpItem, source: ByteSource) -> FileImports | None:
    if not item.plain:
        return FileImports(item.file, unread="an item is transformed by an extension of DCP")
    try:
        return _of_bytes(PartOfBytes(source, item.offset, item.nbytes, item.file), item.file)
    except (LayoutError, FormatError) as error:
        return FileImports(item.file, unread=str(error))


def _of_bytes(source: ByteSource, path: str, *, sure: bool = True) -> FileImports | None:
    """What is in a file, or in an item of one; None if that is no pickle.

    `sure`: bytes that begin like a pickle of protocol 2 or later are one.
    """
    if is_zip(source.read(0, min(4, source.size))):
        return _of_zip(source, path)
    return _of_stream(source, path, sure=sure)


def _of_zip(source: ByteSource, path: str) -> FileImports | None:
    """torch.load reads `data.pkl`, whatever its case, and runs the program in a TorchScript or torch.export archive."""
    imported = None
    for entry in read_entries(source):
        if any(mark in f"/{entry.name}".lower() for mark in _PROGRAMS):
            imported = FileImports(path, unread="it holds a program (torch.jit or torch.export)") | imported
        elif entry.name.lower().endswith(".pkl"):
            read = imports(read_checked(source, entry, MAX_PICKLE_BYTES))
            imported = FileImports(path, read.names, read.unread) | imported
    return imported


def _of_stream(source: ByteSource, path: str, *, sure: bool) -> FileImports | None:
    """Streams from the first byte on, one after the other: torch before 1.6 wrote five, and reads any protocol."""
    found: FileImports | None = None
    start = 0
    for number in range(_MAX_STREAMS):
        if start == source.size:
            return found
        head = source.read(start, min(2, source.size - start))
        read, whole = _stream_at(source, start)
        # What follows a stream may be a storage, whose size looks like the mark of one.
        marked = sure and _is_marked(head) and (not number or read.called or read.cut_off or not read.unread)
        goes_on = not read.followed or (read.cut_off and not whole)
        if marked or goes_on or (read.names and (read.called or not read.unread)):
            found = FileImports(path, read.names, _why(read, whole)) | found
        if read.unread is not None:
            return found
        start += read.stop
    return FileImports(path, unread=f"more than {_MAX_STREAMS} pickles one after the other") | found


def _stream_at(source: ByteSource, start: int) -> tuple[Imports, bool]:
    """What a stream that begins there would import, and whether all that follows was there to be read."""
    rest = source.size - start
    for size in _PREFIXES:
        read = imports(source.read(start, min(size, rest)))
        if not read.cut_off or size >= rest:
            break
    return read, size >= rest


def _is_marked(head: bytes) -> bool:
    """Whether a stream of protocol 2 or later begins so. Earlier ones have no mark: any text may begin like one."""
    return head[:1] == b"\x80" and head[1:] in (b"\2", b"\3", b"\4", b"\5")


def _why(read: Imports, whole: bool) -> str | None:
    if read.cut_off and not whole:
        return f"the pickle is longer than {_PREFIXES[-1] >> 20} MiB, which is not read"
    return read.unread
