"""The source's description inside a compressed file's manifest, and reading it back without trusting it.

The document says how to rebuild the source: its files, which stored item fills which byte range of which file, the
views that name tensors in those ranges, the zip CRCs to recompute, and the moments that belong together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from statecodec.checkpoint import joined
from statecodec.checkpoint.joined import NamedTensor
from statecodec.checkpoint.paths_json import path_from_json, path_to_json, safe_path
from statecodec.checkpoint.stored_files import MAX_TIME, StoredFile, file_from_json, file_to_json
from statecodec.checkpoint.stored_moments import Named
from statecodec.errors import FormatError
from statecodec.layouts import Folder

T = TypeVar("T")

_MAX_SOURCE = 1 << 62  # all files together
_LAYOUT = re.compile(r"[a-z][a-z0-9_]{0,40}")  # not compared with the layouts: restoring needs none
ASKED = "asked"  # the largest errors, in optimizer steps
MAX_LINKS = 16  # a reader opens every file of a chain


@dataclass(frozen=True)
class BaseFile:
    """The compressed checkpoint that this one builds on: only what changed since is stored.

    Args:
        name: Its file name, in the same folder.
        digest: XXH3-128 of its manifest.
        length: How many files the chain has before this one.
    """

    name: str
    digest: str
    length: int


@dataclass(frozen=True)
class Document:
    """Everything that a compressed checkpoint knows about its source."""

    created_by: str
    preset: str | None
    rules: tuple[str, ...]
    source: dict[str, Any]
    files: tuple[StoredFile, ...]
    folders: tuple[Folder, ...]
    """The root (path "") and all subdirectories."""
    notes: tuple[str, ...]
    base: BaseFile | None = None
    tensors: tuple[NamedTensor, ...] = ()
    """Those that are stored in several items."""
    asked: Mapping[str, float] | None = None
    """The largest errors that were asked for, as `Report.asked`; None where the file does not say."""

    @property
    def is_directory(self) -> bool:
        """Whether the source was a directory."""
        return self.source.get("layout") == "directory"

    @property
    def directories(self) -> tuple[str, ...]:
        """Relative posix paths of all subdirectories."""
        return tuple(folder.path for folder in self.folders if folder.path)


def to_json(document: Document, items: Sequence[Named] = ()) -> dict[str, Any]:
    """Plain JSON values; `from_json` is the inverse. `items`: all stored items, if the document has files."""
    base, numbers = document.base, {item.name: i for i, item in enumerate(items)}
    link = {"base": {"file": base.name, "manifest": base.digest, "length": base.length}} if base else {}
    return {
        "created_by": document.created_by,
        "preset": document.preset,
        "rules": list(document.rules),
        "source": {k: path_to_json(v) if k == "name" else v for k, v in document.source.items()},
        "files": [file_to_json(file, items, numbers, document.is_directory) for file in document.files],
        "directories": [path_to_json(path) for path in document.directories],
        "notes": list(document.notes),
        **({"tensors": joined.to_json(document.tensors)} if document.tensors else {}),
        **({} if document.asked is None else {ASKED: dict(document.asked)}),
        **_folder_fields(document.folders),
        **link,
    }


def from_json(value: Mapping[str, Any], items: Sequence[Named]) -> Document:
    """The document, checked against the items. Raises FormatError for anything that does not add up."""
    directory = _get(value, "source", dict).get("layout") == "directory"
    files = tuple(file_from_json(f, items, directory) for f in _list(value, "files"))
    paths = [f.path for f in files]
    if len(set(paths)) != len(paths):
        raise FormatError("the document names a file twice")
    _check_links(files)
    _check_items_used_once(files)
    source = _get(value, "source", dict)
    if source.get("name") is not None:
        source = {**source, "name": path_from_json(source["name"])}
    if not _LAYOUT.fullmatch(_get(source, "layout", str)):
        raise FormatError(f"{source['layout'][:80]!r} in the document is not the name of a layout")
    framework = source.get("framework")
    if framework is not None and not (type(framework) is str and framework.isprintable() and len(framework) <= 1000):
        raise FormatError(f"{str(framework)[:80]!r} in the document is not the name of a framework")
    _integer(source.get("bytes"), 0, _MAX_SOURCE)
    if source["layout"] not in ("directory", "native") and len(files) != 1:
        raise FormatError(f"the document of a single file describes {len(files)} files")
    return Document(
        created_by=_get(value, "created_by", str),
        preset=_optional(value, "preset", str),
        rules=tuple(_strings(value, "rules")),
        source=source,
        files=files,
        folders=_folders(value),
        notes=tuple(_strings(value, "notes")),
        base=_base(value["base"]) if value.get("base") is not None else None,
        tensors=joined.from_json(value.get("tensors", []), items),
        asked=_asked(value.get(ASKED)),
    )


def _folder_fields(folders: Sequence[Folder]) -> dict[str, list[int]]:
    """Modes and times, in the order of the root and then `directories`; only what is known of all folders."""
    modes, times = [f.mode for f in folders], [f.mtime_ns for f in folders]
    fields = {"directory_modes": modes, "directory_times": times}
    return {
        key: [v for v in column if v is not None] for key, column in fields.items() if column and None not in column
    }


def _folders(value: Mapping[str, Any]) -> tuple[Folder, ...]:
    paths = ["", *(safe_path(path_from_json(path)) for path in _list(value, "directories"))]
    columns: dict[str, list[int | None]] = {}
    for key, high in (("directory_modes", 0o7777), ("directory_times", MAX_TIME)):
        numbers = value.get(key)
        if numbers is not None and len(_sequence(numbers)) != len(paths):
            raise FormatError(f"the document's {key!r} does not hold a number for each of {len(paths)} directories")
        columns[key] = [None] * len(paths) if numbers is None else [_integer(n, 0, high) for n in numbers]
    return tuple(map(Folder, paths, columns["directory_modes"], columns["directory_times"]))


def _check_links(files: Sequence[StoredFile]) -> None:
    """Refuse hard links, unless each is to an earlier file of the same size that is no link, and has no own bytes."""
    earlier: dict[str, StoredFile] = {}
    for file in files:
        if file.same_as is not None:
            first = earlier.get(file.same_as)
            if first is None or first.nbytes != file.nbytes or file.regions or file.skeleton is not None:
                raise FormatError(
                    f"{file.path!r} is said to be the same as {file.same_as[:200]!r}, which is no such earlier file"
                )
        else:
            earlier[file.path] = file


def _check_items_used_once(files: Sequence[StoredFile]) -> None:
    """Refuse items that fill several regions: a small file could restore to any number of copies of one item."""
    used = [item for file in files for _, item in file.regions]
    used += [file.skeleton for file in files if file.skeleton is not None]
    if len(set(used)) != len(used):
        raise FormatError("the document puts one item into two places")


def _base(value: Any) -> BaseFile:
    if not isinstance(value, dict):
        raise FormatError("the document's base is not an object")
    name, digest = _get(value, "file", str), _get(value, "manifest", str)
    if not 0 < len(name) < 256 or safe_path(name) != PurePosixPath(name).name or any(ord(c) < 32 for c in name):
        raise FormatError(f"base {name[:200]!r} is not a file name: a link lies beside its base")
    if len(digest) != 32 or not set(digest) <= set("0123456789abcdef"):
        raise FormatError("the digest of the base is not 32 hexadecimal digits")
    return BaseFile(name, digest, _integer(value.get("length"), 1, MAX_LINKS))


def _asked(value: Any) -> dict[str, float] | None:
    if value is None:
        return None
    bounded = isinstance(value, dict) and value.keys() <= {"u_rms", "weight_step_error"}
    if not bounded or not all(type(v) in (int, float) and 0 < v <= 1 for v in value.values()):
        raise FormatError(f"{str(value)[:80]!r} in the document are no errors that can be asked for")
    return {str(name): float(fraction) for name, fraction in value.items()}


def _integer(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{str(value)[:40]!r} in the document is not an integer from {low} to {high}")
    return value


def _get(value: Mapping[str, Any], key: str, kind: type[T]) -> T:
    field = value.get(key)
    if not isinstance(field, kind):
        raise FormatError(f"the document's {key!r} is not a {kind.__name__}")
    return field


def _optional(value: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    return None if value.get(key) is None else _get(value, key, kind)


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    return _get(value, key, list)


def _strings(value: Mapping[str, Any], key: str) -> list[str]:
    strings = _list(value, key)
    if not all(isinstance(s, str) for s in strings):
        raise FormatError(f"the document's {key!r} holds something that is not text")
    return strings


def _sequence(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{str(value)[:40]!r} in the document is not a list")
    return value
