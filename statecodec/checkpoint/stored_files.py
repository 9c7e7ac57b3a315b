"""The source's files as the document describes them, in columns of differences where there are many of a kind.

Documents of format 1.x hold rows instead: one list for each region, view, checksum and pair of moments. Both are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol, cast

from statecodec import dtypes
from statecodec.checkpoint.paths_json import path_from_json, path_to_json, safe_path
from statecodec.dtypes import DType
from statecodec.errors import FormatError
from statecodec.layouts import Crc32, Moments, View
from statecodec.names import shown
from statecodec.strict import Fields

MAX_FILE = 1 << 50
MAX_TIME = (1 << 63) - 1  # nanoseconds since 1970
_SETTINGS = ("beta1", "beta2", "eps", "lr", "weight_decay", "step")
_MAX_NUMEL = 1 << 62  # of a view, which may repeat its elements (expand)


class Named(Protocol):
    """What a document needs to know of a stored item."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType: ...


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


def file_to_json(
    file: StoredFile, items: Sequence[Named], numbers: Mapping[str, int], directory: bool
) -> dict[str, Any]:
    """Plain JSON values of a file; `numbers`: the items' names -> their indices."""
    own = _Own(file.path, file.regions, items, directory)
    plain: dict[str, Any] = {
        "path": path_to_json(file.path),
        "bytes": file.nbytes,
        "mode": file.mode,
        "layout": file.layout,
        "sha256": file.sha256,
        "regions": {
            "gap": _gaps((offset, own.nbytes(i)) for i, (offset, _) in enumerate(file.regions)),
            "item": _differences(item for _, item in file.regions),
        },
        "skeleton": file.skeleton,
        "views": _views_json(file.views, own),
        "crcs": _crcs_json(file.crcs),
        "moments": _moments_json(file.moments, numbers),
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
    own = _Own(path, regions, items, directory)
    if same_as is None:
        filled = sum(own.nbytes(i) for i in range(len(regions)))
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
        views=tuple(_views(fields, own)),
        crcs=crcs,
        moments=tuple(_moments(fields, items)),
        same_as=None if same_as is None else path_from_json(same_as),
        note=fields.take("note", (str, type(None)), None),
        mtime_ns=_optional(fields, "mtime_ns", MAX_TIME),
    )


def _optional(fields: Fields, key: str, high: int) -> int | None:
    return None if fields.take(key, (int, type(None)), None) is None else fields.integer(key, high)


class _Own:
    """The items of a file's regions, and the view that each is by default: the whole of it, under its own name."""

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


# Columns ---------------------------------------------------------------------------------------------------------


def _differences(values: Any) -> list[int]:
    """Each value less the one before it: of numbers that rise evenly, the same number again and again."""
    found, last = [], 0
    for value in values:
        found.append(value - last)
        last = value
    return found


def _summed(fields: Fields, key: str, low: int, high: int, what: str) -> list[int]:
    """The values that a column of differences stands for, each in its range."""
    found, value = [], 0
    for difference in fields.take(key, list):
        if type(difference) is not int:
            raise FormatError(f"{what}: {key!r} holds something that is no integer")
        value += difference
        if not low <= value <= high:
            raise FormatError(f"{what}: {key!r} gives {str(value)[:40]}, expected {low} to {high}")
        found.append(value)
    return found


def _gaps(spans: Any) -> list[int]:
    """The bytes between each span (offset, nbytes) and the end of the one before it."""
    found, end = [], 0
    for offset, nbytes in spans:
        found.append(offset - end)
        end = offset + nbytes
    return found


# Regions ---------------------------------------------------------------------------------------------------------


def _regions(fields: Fields, nbytes: int, items: Sequence[Named]) -> Iterator[tuple[int, int]]:
    """Disjoint, in order and inside the file."""
    value, what = fields.take("regions", (dict, list)), f"{fields.where}: regions"
    if isinstance(value, dict):
        columns = Fields(value, what)
        numbers, gaps = _summed(columns, "item", 0, len(items) - 1, what), columns.take("gap", list)
        if len(gaps) != len(numbers) or any(type(gap) is not int for gap in gaps):
            raise FormatError(f"{what}: not one gap for each item")
        end = 0
        rows: list[tuple[Any, Any]] = []
        for gap, number in zip(gaps, numbers, strict=True):
            rows.append((end + gap, number))
            end += gap + _nbytes(items[number])
    else:
        rows = _rows(value, 2, what)
    end = 0
    for offset, number in rows:
        _integer(number, 0, len(items) - 1, what)
        _integer(offset, end, nbytes - _nbytes(items[number]), what)
        end = offset + _nbytes(items[number])
        yield offset, number


# Views -----------------------------------------------------------------------------------------------------------


def _views_json(views: Sequence[View], own: _Own) -> list[Any]:
    """Runs [start, stop] of regions that are seen by default, and other views as rows."""
    found: list[Any] = []
    for view in views:
        if view == own.view(view.region):
            if found and len(found[-1]) == 2 and found[-1][1] == view.region:
                found[-1][1] += 1
            else:
                found.append([view.region, view.region + 1])
        else:
            dtype = view.dtype.name
            found.append([view.name, view.region, dtype, list(view.shape), list(view.stride), view.offset])
    return found


def _views(fields: Fields, own: _Own) -> Iterator[View]:
    what, most = f"{fields.where}: views", len(own)
    for row in fields.take("views", list):
        if type(row) is list and len(row) == 2:
            start = _integer(row[0], 0, len(own), what)
            stop = _integer(row[1], start, len(own), what)
            most -= stop - start
            if most < 0:
                raise FormatError(f"{what}: a region is seen by default more than once")
            for region in range(start, stop):
                yield own.view(region)
        else:
            yield _view(_rows([row], 6, what)[0], own, what)


def _view(row: Sequence[Any], own: _Own, what: str) -> View:
    name, region, dtype_name, shape, stride, offset = row
    dtype = dtypes.TORCH.get(dtype_name) if isinstance(dtype_name, str) else None
    if not isinstance(name, str) or dtype is None:
        raise FormatError(f"{what}: {str(name)[:80]!r} has unknown dtype {str(dtype_name)[:40]!r}")
    _integer(region, 0, len(own) - 1, what)
    dims, steps = _integers(shape, what), _integers(stride, what)
    start = _integer(offset, 0, MAX_FILE, what)
    reach = sum((n - 1) * s for n, s in zip(dims, steps, strict=False)) + 1 if 0 not in dims else 0
    fits = start + reach <= own.nbytes(region) // dtype.itemsize
    if len(dims) != len(steps) or not fits or math.prod(dims) > _MAX_NUMEL:
        raise FormatError(f"{what}: {name!r} does not fit into its region")
    return View(name, region, dtype, dims, steps, start)


# Checksums of the source -----------------------------------------------------------------------------------------


def _crcs_json(crcs: Sequence[Crc32]) -> Any:
    """Columns, if every checksum stands at as many places."""
    places = {len(c.at) for c in crcs}
    if len(places) != 1:
        return [[c.offset, c.nbytes, list(c.at)] for c in crcs]
    return {
        "offset": _gaps((c.offset, c.nbytes) for c in crcs),
        "nbytes": [c.nbytes for c in crcs],
        "at": [_differences(c.at[k] for c in crcs) for k in range(places.pop())],
    }


def _crcs(fields: Fields, nbytes: int) -> Iterator[Crc32]:
    value, what = fields.take("crcs", (dict, list)), f"{fields.where}: checksums"
    if isinstance(value, dict):
        columns = Fields(value, what)
        gaps, sizes = columns.take("offset", list), columns.take("nbytes", list)
        at = [_summed(Fields({"at": c}, what), "at", 0, nbytes - 4, what) for c in columns.take("at", list)]
        if any(len(column) != len(sizes) for column in (gaps, *at)):
            raise FormatError(f"{what}: columns of several lengths")
        end, rows = 0, []
        for i, (gap, size) in enumerate(zip(gaps, sizes, strict=True)):
            if type(gap) is not int or type(size) is not int:
                raise FormatError(f"{what}: something that is no integer")
            rows.append([end + gap, size, [column[i] for column in at]])
            end += gap + size
    else:
        rows = _rows(value, 3, what)
    for offset, size, places in rows:
        start = _integer(offset, 0, nbytes, what)
        length = _integer(size, 0, nbytes - start, what)
        yield Crc32(start, length, tuple(_integer(at, 0, nbytes - 4, what) for at in _sequence(places, what)))


# Moments ---------------------------------------------------------------------------------------------------------


def _moments_json(moments: Sequence[Moments], numbers: Mapping[str, int]) -> Any:
    """Columns of item indices, and each combination of settings once."""
    if not moments:
        return []
    settings = [tuple(getattr(m, key) for key in _SETTINGS) for m in moments]
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(settings))}
    return {
        "param": [m.param for m in moments],
        "exp_avg": _differences(numbers[m.exp_avg] for m in moments),
        "exp_avg_sq": _differences(numbers[m.exp_avg_sq] for m in moments),
        "weight": _differences(-1 if m.weight is None else numbers[m.weight] for m in moments),
        "settings": [list(kind) for kind in kinds],
        "kind": [kinds[kind] for kind in settings],
    }


def _moments(fields: Fields, items: Sequence[Named]) -> Iterator[Moments]:
    value, what = fields.take("moments", (dict, list)), f"{fields.where}: moments"
    if isinstance(value, list):
        yield from (_checked(Fields(row, what).values, what) for row in value)
        return
    columns = Fields(value, what)
    settings = _rows(columns.take("settings", list), len(_SETTINGS), what)
    params, kinds = columns.take("param", list), columns.take("kind", list)
    first, second = (_summed(columns, key, 0, len(items) - 1, what) for key in ("exp_avg", "exp_avg_sq"))
    weights = _summed(columns, "weight", -1, len(items) - 1, what)
    if len({len(column) for column in (params, kinds, first, second, weights)}) != 1:
        raise FormatError(f"{what}: columns of several lengths")
    for param, kind, m, v, w in zip(params, kinds, first, second, weights, strict=True):
        chosen = settings[_integer(kind, 0, len(settings) - 1, what)]
        weight = None if w < 0 else items[w].name
        names = {"param": param, "exp_avg": items[m].name, "exp_avg_sq": items[v].name, "weight": weight}
        yield _checked({**names, **dict(zip(_SETTINGS, chosen, strict=True))}, what)


def _checked(value: Mapping[str, Any], what: str) -> Moments:
    number = {k: value.get(k) for k in _SETTINGS}
    text = {k: value.get(k) for k in ("param", "exp_avg", "exp_avg_sq", "weight")}
    optional = ("lr", "weight_decay", "step", "param", "weight")
    sound = {k: type(v) in (int, float) and abs(v) < 1e300 for k, v in number.items() if v is not None}
    if not all(sound.get(k, k in optional) for k in number):
        raise FormatError(f"{what}: a setting is not a number")
    if not all(isinstance(v, str) or (v is None and k in optional) for k, v in text.items()):
        raise FormatError(f"{what}: a name is not text")
    return Moments(**cast(Any, text), **cast(Any, number))


def _integer(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{what}: {str(value)[:40]!r} is not an integer from {low} to {high}")
    return value


def _integers(value: Any, what: str) -> tuple[int, ...]:
    return tuple(_integer(n, 0, MAX_FILE, what) for n in _sequence(value, what))


def _sequence(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{what}: {str(value)[:40]!r} is not a list")
    return value


def _rows(rows: list[Any], width: int, what: str) -> list[Any]:
    if not all(isinstance(row, list) and len(row) == width for row in rows):
        raise FormatError(f"{what}: expected lists of {width}")
    return rows
