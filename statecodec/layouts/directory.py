"""Finds out what a path holds: one checkpoint file, or a directory of any files.

What a file is, its content decides, never its extension. A single file must be understood. In a directory nothing is
refused for its content: a file that is not understood, or that looks like a checkpoint and is damaged, is carried as
opaque bytes with a note, so that one half-written shard does not keep a user from packing the rest. What is refused is
what cannot be carried faithfully or safely: symbolic links, devices, sockets and pipes.
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Final

from statecodec.errors import LayoutError, LegacyTorchFile, MalformedCheckpoint, UnknownLayout
from statecodec.files import FileBytes, Identity, opened
from statecodec.layouts import safetensors_file, torch_zip
from statecodec.layouts.base import Folder, Source, SourceFile
from statecodec.layouts.collecting import collector_paused
from statecodec.layouts.describe import Described, finish
from statecodec.layouts.facts.assign import assign

_HEAD: Final = 2048
_MAX_FILES: Final = 200_000
_MAX_DEPTH: Final = 64


@collector_paused()
def locate(path: str | os.PathLike[str]) -> Source:
    """Locate the tensors of a checkpoint file or directory, reading headers, directories and pickles but no payload.

    Raises UnknownLayout (a single file that is nothing we know; a path that is neither file nor directory),
    LegacyTorchFile (a torch file from before 1.6) and MalformedCheckpoint (truncated, lying or hostile).
    """
    root = Path(path)
    try:
        status = root.stat()  # the path that the user gave may itself be a symbolic link
        if stat.S_ISDIR(status.st_mode):
            return _locate_directory(root)
        if not stat.S_ISREG(status.st_mode):
            raise UnknownLayout(f"{root} is neither a file nor a directory")
        with opened(root) as source:
            (file,) = _with_roles([_describe(source, root.name)])
            files = [replace(file, identity=source.identity)]
    except OSError as error:
        raise UnknownLayout(f"{root} cannot be read: {error.strerror or error}") from error
    except LayoutError as error:
        raise type(error)(f"{root}: {error}") from None
    return Source(root, is_directory=False, files=tuple(files))


def _describe(source: FileBytes, path: str) -> Described:
    """Describe a file by its content. Raises UnknownLayout if it is nothing we know."""
    head = source.read(0, min(_HEAD, source.size))
    if torch_zip.is_zip(head):
        return torch_zip.describe(source, path, source.mode)
    if safetensors_file.is_safetensors(head, source.size):
        return safetensors_file.describe(source, path, source.mode)
    torch_zip.refuse_legacy(head)
    if not head:
        raise MalformedCheckpoint("the file is empty")
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        raise UnknownLayout("a bare pickle, which cannot be read without running it; save it with torch.save")
    if b"PK\x03\x04" in head:
        raise MalformedCheckpoint("unknown bytes before what looks like a zip archive")
    raise UnknownLayout(
        "neither a torch.save file nor a safetensors file (those two are known, and directories of files)"
    )


def _with_roles(described: list[Described]) -> list[SourceFile]:
    roles = [d.for_roles() for d in described]
    assign(roles)
    return [finish(d, r) for d, r in zip(described, roles, strict=True)]


def _locate_directory(root: Path) -> Source:
    paths, folders = _listing(root)
    if not paths:
        raise UnknownLayout("the directory holds no file")
    first_of_inode: dict[tuple[int, int], str] = {}
    identities: dict[str, Identity] = {}
    described: list[Described] = []
    plain: dict[str, SourceFile] = {}
    for path in paths:
        with opened(root / path, path, follow=False) as source:
            identity, mode = source.identity, source.mode
            identities[path] = identity
            first = first_of_inode.setdefault((identity.device, identity.inode), path)
            if first != path:
                plain[path] = SourceFile(path, source.size, mode, "opaque", same_as=first)
                continue
            try:
                described.append(_describe(source, path))
            except UnknownLayout:
                plain[path] = SourceFile(path, source.size, mode, "opaque")
            except (LegacyTorchFile, MalformedCheckpoint) as error:
                note = str(error) if source.size else None
                plain[path] = SourceFile(path, source.size, mode, "opaque", note=note)
    located = {file.path: file for file in _with_roles(described)}
    for path, file in plain.items():
        if file.same_as in located:
            plain[path] = replace(file, layout=located[file.same_as].layout)
    files = (replace(plain.get(path) or located[path], identity=identities[path]) for path in paths)
    return Source(root, True, tuple(files), folders)


def _listing(root: Path) -> tuple[list[str], tuple[Folder, ...]]:
    """(files, the root and all folders below it), relative and sorted. Iterative; never follows a link."""
    files: list[str] = []
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
                    raise UnknownLayout(f"{path} is a symbolic link; replace it by what it points to, or leave it out")
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                elif entry.is_file(follow_symlinks=False):
                    files.append(path)
                else:
                    raise UnknownLayout(f"{path} is a device, socket or pipe, not a file")
                if len(files) + len(folders) + len(pending) > _MAX_FILES:
                    raise UnknownLayout(f"holds more than {_MAX_FILES} files; pack its subdirectories one by one")
    return sorted(files), tuple(sorted(folders, key=lambda folder: folder.path))
