"""The source's description inside a compressed file's manifest, and reading it back without trusting it.

The document says how to rebuild the source: its files, which stored item fills which byte range of which file, the
views that name tensors in those ranges, the zip CRCs to recompute, and the moments that belong together.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, TypeVar, cast

import torch

from statecodec.errors import FormatError
from statecodec.layouts import Crc32, Folder, Moments, View

T = TypeVar("T")

_MAX_FILE = 1 << 50
_MAX_SOURCE = 1 << 62  # all files together
_MAX_TIME = (1 << 63) - 1  # nanoseconds since 1970
_LAYOUT = re.compile(r"[a-z][a-z0-9_]{0,40}")  # restoring needs no layout; loading finds out whether it is known
MAX_LINKS = 16  # a reader opens every file of a chain


@dataclass(frozen=True)
class StoredFile:
    """One source file as a compressed checkpoint describes it. `regions`: (offset in the file, item index), by
    offset.
    """

    path: str
    nbytes: int
    mode: int
    layout: str
    sha256: str | None
    regions: tuple[tuple[int, int], ...]
    skeleton: int | None
    views: tuple[View, ...]
    crcs: tuple[Crc32, ...]
    moments: tuple[Moments, ...]
    same_as: str | None = None
    note: str | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True)
class BaseFile:
    """The compressed checkpoint that this one stores the changes since: its file name, beside this one, its manifest's
    XXH3-128, and how many files the chain has before this one."""

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

    @property
    def is_directory(self) -> bool:
        return self.source.get("layout") == "directory"

    @property
    def directories(self) -> tuple[str, ...]:
        """Relative posix paths of all subdirectories."""
        return tuple(folder.path for folder in self.folders if folder.path)


def to_json(document: Document) -> dict[str, Any]:
    """Plain JSON values; `from_json` is the inverse."""
    base = document.base
    link = {"base": {"file": base.name, "manifest": base.digest, "length": base.length}} if base else {}
    return {
        "created_by": document.created_by,
        "preset": document.preset,
        "rules": list(document.rules),
        "source": {k: _path_to_json(v) if k == "name" else v for k, v in document.source.items()},
        "files": [_file_to_json(file) for file in document.files],
        "directories": [_path_to_json(path) for path in document.directories],
        "notes": list(document.notes),
        **_folder_fields(document.folders),
        **link,
    }


def from_json(value: Mapping[str, Any], sizes: Sequence[int]) -> Document:
    """The document, checked against the items' decoded sizes in bytes. Raises FormatError for anything that does not
    add up.
    """
    files = tuple(_file_from_json(f, sizes) for f in _list(value, "files"))
    paths = [f.path for f in files]
    if len(set(paths)) != len(paths):
        raise FormatError("the document names a file twice")
    _check_links(files)
    _check_items_used_once(files)
    source = _get(value, "source", dict)
    if source.get("name") is not None:
        source = {**source, "name": _path_from_json(source["name"])}
    if not _LAYOUT.fullmatch(_get(source, "layout", str)):
        raise FormatError(f"{source['layout'][:80]!r} in the document is not the name of a layout")
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
    )


def _folder_fields(folders: Sequence[Folder]) -> dict[str, list[int]]:
    """Modes and times, in the order of the root and then `directories`; only what is known of all of them."""
    modes, times = [f.mode for f in folders], [f.mtime_ns for f in folders]
    fields = {"directory_modes": modes, "directory_times": times}
    return {key: [v for v in found if v is not None] for key, found in fields.items() if found and None not in found}


def _folders(value: Mapping[str, Any]) -> tuple[Folder, ...]:
    paths = ["", *(_safe_path(_path_from_json(path)) for path in _list(value, "directories"))]
    found: dict[str, list[int | None]] = {}
    for key, high in (("directory_modes", 0o7777), ("directory_times", _MAX_TIME)):
        numbers = value.get(key)
        if numbers is not None and len(_sequence(numbers)) != len(paths):
            raise FormatError(f"the document's {key!r} does not hold a number for each of {len(paths)} directories")
        found[key] = [None] * len(paths) if numbers is None else [_integer(n, 0, high) for n in numbers]
    return tuple(map(Folder, paths, found["directory_modes"], found["directory_times"]))


def _check_links(files: Sequence[StoredFile]) -> None:
    """A hard link is to an earlier file of the same size that is none itself, and has no bytes of its own."""
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
    """Otherwise a small file could restore to any number of copies of one item."""
    used = [item for file in files for _, item in file.regions]
    used += [file.skeleton for file in files if file.skeleton is not None]
    if len(set(used)) != len(used):
        raise FormatError("the document puts one item into two places")


def _base(value: Any) -> BaseFile:
    if not isinstance(value, dict):
        raise FormatError("the document's base is not an object")
    name, digest = _get(value, "file", str), _get(value, "manifest", str)
    if not 0 < len(name) < 256 or _safe_path(name) != PurePosixPath(name).name or any(ord(c) < 32 for c in name):
        raise FormatError(f"base {name[:200]!r} is not a file name: a link lies beside its base")
    if len(digest) != 32 or not set(digest) <= set("0123456789abcdef"):
        raise FormatError("the digest of the base is not 32 hexadecimal digits")
    return BaseFile(name, digest, _integer(value.get("length"), 1, MAX_LINKS))


def _file_to_json(file: StoredFile) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "path": _path_to_json(file.path),
        "bytes": file.nbytes,
        "mode": file.mode,
        "layout": file.layout,
        "sha256": file.sha256,
        "regions": [list(r) for r in file.regions],
        "skeleton": file.skeleton,
        "views": [
            [v.name, v.region, str(v.dtype).removeprefix("torch."), list(v.shape), list(v.stride), v.offset]
            for v in file.views
        ],
        "crcs": [[c.offset, c.nbytes, list(c.at)] for c in file.crcs],
        "moments": [vars(m) for m in file.moments],
    }
    same_as = None if file.same_as is None else _path_to_json(file.same_as)
    optional = {"same_as": same_as, "note": file.note, "mtime_ns": file.mtime_ns}
    return plain | {key: value for key, value in optional.items() if value is not None}


def _file_from_json(value: Any, sizes: Sequence[int]) -> StoredFile:
    if not isinstance(value, dict):
        raise FormatError("a file of the document is not an object")
    nbytes = _integer(value.get("bytes"), 0, _MAX_FILE)
    regions = tuple((_integer(o, 0, nbytes), _integer(i, 0, len(sizes) - 1)) for o, i in _rows(value, "regions", 2))
    skeleton = value.get("skeleton")
    if skeleton is not None:
        _integer(skeleton, 0, len(sizes) - 1)
    _check_cover(value.get("path"), nbytes, regions, skeleton, sizes, value.get("same_as"))
    views = tuple(_view(row, regions, sizes) for row in _rows(value, "views", 6))
    crcs = tuple(
        Crc32(
            _integer(o, 0, nbytes),
            _integer(n, 0, nbytes - o),
            tuple(_integer(at, 0, nbytes - 4) for at in _sequence(ats)),
        )
        for o, n, ats in _rows(value, "crcs", 3)
    )
    ends = sorted((c.offset, c.offset + c.nbytes) for c in crcs)
    if any(stop > start for (_, stop), (start, _) in pairwise(ends)):
        raise FormatError(f"checksums of {str(value.get('path'))[:200]!r} are over bytes that overlap")
    return StoredFile(
        path=_safe_path(_path_from_json(value.get("path"))),
        nbytes=nbytes,
        mode=_integer(value.get("mode"), 0, 0o7777) & 0o777,
        layout=_get(value, "layout", str),
        sha256=_optional(value, "sha256", str),
        regions=regions,
        skeleton=skeleton,
        views=views,
        crcs=crcs,
        moments=tuple(_moments(m) for m in _list(value, "moments")),
        same_as=None if value.get("same_as") is None else _path_from_json(value["same_as"]),
        note=_optional(value, "note", str),
        mtime_ns=None if value.get("mtime_ns") is None else _integer(value["mtime_ns"], 0, _MAX_TIME),
    )


def _check_cover(
    path: Any, nbytes: int, regions: Sequence[tuple[int, int]], skeleton: int | None, sizes: Sequence[int], same_as: Any
) -> None:
    """Regions are disjoint, in order and inside the file, and together with the skeleton fill it exactly."""
    end = 0
    for offset, item in regions:
        if offset < end or offset + sizes[item] > nbytes:
            raise FormatError(f"regions of {str(path)!r} overlap or leave the file")
        end = offset + sizes[item]
    filled = sum(sizes[item] for _, item in regions) + (sizes[skeleton] if skeleton is not None else 0)
    if same_as is None and filled != nbytes:
        raise FormatError(f"{str(path)!r} is said to have {nbytes} bytes, but its parts fill {filled}")


def _view(row: Sequence[Any], regions: Sequence[tuple[int, int]], sizes: Sequence[int]) -> View:
    name, region, dtype_name, shape, stride, offset = row
    dtype = getattr(torch, str(dtype_name), None)
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
        raise FormatError(f"view {str(name)[:80]!r} has unknown dtype {str(dtype_name)[:40]!r}")
    _integer(region, 0, len(regions) - 1)
    dims = tuple(_integer(n, 0, _MAX_FILE) for n in _sequence(shape))
    steps = tuple(_integer(n, 0, _MAX_FILE) for n in _sequence(stride))
    start = _integer(offset, 0, _MAX_FILE)
    available = sizes[regions[region][1]] // dtype.itemsize
    reach = sum((n - 1) * s for n, s in zip(dims, steps, strict=False)) + 1 if 0 not in dims else 0
    if len(dims) != len(steps) or start + reach > available or math.prod(dims) > 1 << 48:
        raise FormatError(f"view {name!r} does not fit into its region")
    return View(name, region, dtype, dims, steps, start)


def _moments(value: Any) -> Moments:
    if not isinstance(value, dict):
        raise FormatError("a pair of moments is not an object")
    number = {k: value.get(k) for k in ("beta1", "beta2", "eps", "lr", "weight_decay", "step")}
    text = {k: value.get(k) for k in ("param", "exp_avg", "exp_avg_sq", "weight")}
    optional = ("lr", "weight_decay", "step", "param", "weight")
    sound = {k: type(v) in (int, float) and abs(v) < 1e300 for k, v in number.items() if v is not None}
    if not all(sound.get(k, k in optional) for k in number):
        raise FormatError("a pair of moments has a setting that is not a number")
    if not all(isinstance(v, str) or (v is None and k in optional) for k, v in text.items()):
        raise FormatError("a pair of moments has a name that is not text")
    return Moments(**cast(Any, text), **cast(Any, number))


def _path_to_json(path: str) -> str | dict[str, str]:
    """A path as text; one that is not UTF-8, which JSON cannot hold, as its bytes in hexadecimal."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return {"bytes": os.fsencode(path).hex()}
    return path


def _path_from_json(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"bytes"} and isinstance(value["bytes"], str):
        try:
            return os.fsdecode(bytes.fromhex(value["bytes"]))
        except ValueError:
            raise FormatError(f"path {value['bytes'][:80]!r} in the document is not hexadecimal") from None
    if not isinstance(value, str):
        raise FormatError(f"{str(value)[:80]!r} in the document is not a path")
    return value


def _safe_path(path: str) -> str:
    parts = PurePosixPath(path).parts
    if (
        not path
        or path.startswith("/")
        or ".." in parts
        or "\0" in path
        or (os.sep != "/" and os.sep in path)
        or str(PurePosixPath(path)) != path
        or path == "."
    ):
        raise FormatError(f"unsafe path {path[:200]!r} in the document")
    return path


def _integer(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{str(value)[:40]!r} in the document is not an integer from {low} to {high}")
    return value


def _get(value: Mapping[str, Any], key: str, kind: type[T]) -> T:
    found = value.get(key)
    if not isinstance(found, kind):
        raise FormatError(f"the document's {key!r} is not a {kind.__name__}")
    return found


def _optional(value: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    return None if value.get(key) is None else _get(value, key, kind)


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    return _get(value, key, list)


def _strings(value: Mapping[str, Any], key: str) -> list[str]:
    found = _list(value, key)
    if not all(isinstance(s, str) for s in found):
        raise FormatError(f"the document's {key!r} holds something that is not text")
    return found


def _sequence(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{str(value)[:40]!r} in the document is not a list")
    return value


def _rows(value: Mapping[str, Any], key: str, width: int) -> list[list[Any]]:
    rows = _list(value, key)
    if not all(isinstance(row, list) and len(row) == width for row in rows):
        raise FormatError(f"the document's {key!r} does not hold lists of {width}")
    return rows
