"""The source's files as the document describes them, in columns of differences where there are many of a kind.

Documents of format 1.x hold rows instead: one list for each region, view, checksum and pair of moments. Both are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from statecodec import dtypes
from statecodec.checkpoint.json_columns import (
    MAX_FILE,
    differences,
    gaps,
    integer,
    integers,
    lists_of,
    sequence,
    summed,
)
from statecodec.checkpoint.paths_json import path_from_json, path_to_json, safe_path
from statecodec.checkpoint.stored_moments import Named, moments_from_json, moments_to_json
from statecodec.errors import FormatError
from statecodec.layouts import Crc32, Moments, View
from statecodec.names import shown
from statecodec.strict import Fields

MAX_TIME = (1 << 63) - 1  # nanoseconds since 1970
_MAX_NUMEL = (1 << 63) - 1  # elements of a view, which may repeat elements (expand)


@dataclass(frozen=True)
class StoredFile:
    """One source file as a compressed checkpoint describes it.

    `regions` are (offset in the file, item index), sorted by offset.
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


def file_to_json(
    file: StoredFile, items: Sequence[Named], numbers: Mapping[str, int], directory: bool
) -> dict[str, Any]:
    """Plain JSON values of a file; `numbers`: the items' names -> their indices."""
    whole = _Own(file.path, file.regions, items, directory)
    plain: dict[str, Any] = {
        "path": path_to_json(file.path),
        "bytes": file.nbytes,
        "mode": file.mode,
        "layout": file.layout,
        "sha256": file.sha256,
        "regions": {
            "gap": gaps((offset, whole.nbytes(i)) for i, (offset, _) in enumerate(file.regions)),
            "item": differences(item for _, item in file.regions),
        },
        "skeleton": file.skeleton,
        "views": _views_json(file.views, whole),
        "crcs": _crcs_json(file.crcs),
        "moments": moments_to_json(file.moments, numbers),
    }
    same_as = None if file.same_as is None else path_to_json(file.same_as)
    optional = {"same_as": same_as, "note": file.note, "mtime_ns": file.mtime_ns}
    return plain | {key: value for key, value in optional.items() if value is not None}


def file_from_json(value: Any, items: Sequence[Named], directory: bool) -> StoredFile:
    """A file from untrusted JSON. Raises FormatError for anything that does not add up."""
    fields = Fields(value, "document: file")
    path = path_from_json(fields.take("path", (str, dict)))
    fields.where = f"document: file {path[:200]!r}"
    nbytes = fields.integer("bytes", MAX_FILE)
    skeleton = _optional(fields, "skeleton", len(items) - 1)
    same_as = fields.take("same_as", (str, dict, type(None)), None)
    regions = tuple(_regions(fields, nbytes, items))
    whole = _Own(path, regions, items, directory)
    if same_as is None:
        filled = sum(whole.nbytes(i) for i in range(len(regions)))
        filled += 0 if skeleton is None else _nbytes(items[skeleton])
        if filled != nbytes:
            raise FormatError(f"{fields.where}: {nbytes} bytes are stated, its parts fill {filled}")
    crcs = tuple(_crcs(fields, nbytes))
    ends = sorted((c.offset, c.offset + c.nbytes) for c in crcs)
    if any(stop > start for (_, stop), (start, _) in pairwise(ends)):
        raise FormatError(f"{fields.where}: checksums are over bytes that overlap")
    return StoredFile(
        path=safe_path(path),
        nbytes=nbytes,
        mode=fields.integer("mode", 0o7777) & 0o777,
        layout=fields.take("layout", str),
        sha256=fields.take("sha256", (str, type(None)), None),
        regions=regions,
        skeleton=skeleton,
        views=tuple(_views(fields, whole)),
        crcs=crcs,
        moments=tuple(moments_from_json(fields, items)),
        same_as=None if same_as is None else path_from_json(same_as),
        note=fields.take("note", (str, type(None)), None),
        mtime_ns=_optional(fields, "mtime_ns", MAX_TIME),
    )


def _optional(fields: Fields, key: str, high: int) -> int | None:
    return None if fields.take(key, (int, type(None)), None) is None else fields.integer(key, high)


class _Own:
    """The items of a file's regions, and the default view of each: the whole region, under the item's name."""

    def __init__(self, path: str, regions: Sequence[tuple[int, int]], items: Sequence[Named], directory: bool) -> None:
        self._prefix = f"{shown(path)}:" if directory else ""
        self._items = [items[item] for _, item in regions]

    def __len__(self) -> int:
        return len(self._items)

    def nbytes(self, region: int) -> int:
        return _nbytes(self._items[region])

    def view(self, region: int) -> View:
        item = self._items[region]
        name, shape = item.name.removeprefix(self._prefix), tuple(item.shape)
        return View(name, region, item.dtype, shape, _strides(shape), 0)


def _nbytes(item: Named) -> int:
    return math.prod(item.shape) * item.dtype.itemsize


@lru_cache(1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major, as torch counts them (dimensions of size 0 as 1)."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


# Regions ---------------------------------------------------------------------------------------------------------


def _regions(fields: Fields, nbytes: int, items: Sequence[Named]) -> Iterator[tuple[int, int]]:
    """Disjoint, in order and inside the file."""
    value, where = fields.take("regions", (dict, list)), f"{fields.where}: regions"
    if isinstance(value, dict):
        columns = Fields(value, where)
        numbers, gaps = summed(columns, "item", 0, len(items) - 1, where), columns.take("gap", list)
        if len(gaps) != len(numbers) or any(type(gap) is not int for gap in gaps):
            raise FormatError(f"{where}: not one gap for each item")
        end = 0
        rows: list[tuple[Any, Any]] = []
        for gap, number in zip(gaps, numbers, strict=True):
            rows.append((end + gap, number))
            end += gap + _nbytes(items[number])
    else:
        rows = lists_of(value, 2, where)
    end = 0
    for offset, number in rows:
        integer(number, 0, len(items) - 1, where)
        integer(offset, end, nbytes - _nbytes(items[number]), where)
        end = offset + _nbytes(items[number])
        yield offset, number


# Views -----------------------------------------------------------------------------------------------------------


def _views_json(views: Sequence[View], whole: _Own) -> list[Any]:
    """Runs [start, stop] of regions with the default view, and rows for other views."""
    rows: list[Any] = []
    for view in views:
        if view == whole.view(view.region):
            if rows and len(rows[-1]) == 2 and rows[-1][1] == view.region:
                rows[-1][1] += 1
            else:
                rows.append([view.region, view.region + 1])
        else:
            dtype = view.dtype.name
            rows.append([view.name, view.region, dtype, list(view.shape), list(view.stride), view.offset])
    return rows


def _views(fields: Fields, whole: _Own) -> Iterator[View]:
    where, most = f"{fields.where}: views", len(whole)
    for row in fields.take("views", list):
        if type(row) is list and len(row) == 2:
            start = integer(row[0], 0, len(whole), where)
            stop = integer(row[1], start, len(whole), where)
            most -= stop - start
            if most < 0:
                raise FormatError(f"{where}: a region is seen by default more than once")
            for region in range(start, stop):
                yield whole.view(region)
        else:
            yield _view(lists_of([row], 6, where)[0], whole, where)


def _view(row: Sequence[Any], whole: _Own, where: str) -> View:
    name, region, dtype_name, shape, stride, offset = row
    dtype = dtypes.TORCH.get(dtype_name) if isinstance(dtype_name, str) else None
    if not isinstance(name, str) or dtype is None:
        raise FormatError(f"{where}: {str(name)[:80]!r} has unknown dtype {str(dtype_name)[:40]!r}")
    integer(region, 0, len(whole) - 1, where)
    dims, strides = integers(shape, _MAX_NUMEL, where), integers(stride, _MAX_NUMEL, where)
    start = integer(offset, 0, MAX_FILE, where)
    reach = sum((n - 1) * s for n, s in zip(dims, strides, strict=False)) + 1 if 0 not in dims else 0
    fits = start + reach <= whole.nbytes(region) // dtype.itemsize
    if len(dims) != len(strides) or not fits or math.prod(dims) > _MAX_NUMEL:
        raise FormatError(f"{where}: {name!r} does not fit into its region")
    return View(name, region, dtype, dims, strides, start)


# Checksums of the source -----------------------------------------------------------------------------------------


def _crcs_json(crcs: Sequence[Crc32]) -> Any:
    """Columns, if every checksum is written at as many places as the others."""
    places = {len(c.at) for c in crcs}
    if len(places) != 1:
        return [[c.offset, c.nbytes, list(c.at)] for c in crcs]
    return {
        "offset": gaps((c.offset, c.nbytes) for c in crcs),
        "nbytes": [c.nbytes for c in crcs],
        "at": [differences(c.at[k] for c in crcs) for k in range(places.pop())],
    }


def _crcs(fields: Fields, nbytes: int) -> Iterator[Crc32]:
    value, where = fields.take("crcs", (dict, list)), f"{fields.where}: checksums"
    if isinstance(value, dict):
        columns = Fields(value, where)
        gaps, sizes = columns.take("offset", list), columns.take("nbytes", list)
        at = [summed(Fields({"at": c}, where), "at", 0, nbytes - 4, where) for c in columns.take("at", list)]
        if any(len(column) != len(sizes) for column in (gaps, *at)):
            raise FormatError(f"{where}: columns of several lengths")
        end, rows = 0, []
        for i, (gap, size) in enumerate(zip(gaps, sizes, strict=True)):
            if type(gap) is not int or type(size) is not int:
                raise FormatError(f"{where}: something that is no integer")
            rows.append([end + gap, size, [column[i] for column in at]])
            end += gap + size
    else:
        rows = lists_of(value, 3, where)
    for offset, size, places in rows:
        start = integer(offset, 0, nbytes, where)
        length = integer(size, 0, nbytes - start, where)
        yield Crc32(start, length, tuple(integer(at, 0, nbytes - 4, where) for at in sequence(places, where)))
