"""The tensors of a report as a table: a row for each tensor, or for each role and codec."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from statecodec_cli import console
from statecodec_cli.grid import Column, TextTable

Document = Mapping[str, Any]
_ROLES = (
    "weight", "master", "ema", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum", "step", "other", "skeleton",
    "file",
)  # fmt: skip
NO_TENSORS = {"skeleton": "not tensors", "file": "other files"}  # listed under these names, but not counted
_FRACTION = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+")
_FITTED = re.compile(rf"\w+=(?:{_FRACTION.pattern})(?:,|(?=\)))")

NAME = Column("tensor", text=True, gives="middle")
ROLE, SHAPE, DTYPE = (
    Column("role", text=True),
    Column("shape", text=True, drop=4),
    Column("dtype", text=True, drop=5),
)
_CODEC = Column("codec", text=True, gives="fold")
_BEFORE, _AFTER, _RATIO = Column("before", drop=2), Column("after"), Column("ratio")
ERROR, STEP_ERROR = Column("rel. rms"), Column("step error")


def body(document: Document, *, every: bool) -> TextTable:
    """The tensors of a report, one by one or summed up."""
    tensors, packed = list(_whole(document["tensors"])), is_of_compressed(document)
    return _tensors(tensors, packed=packed) if every else _summary(tensors, packed=packed)


def _whole(tensors: Iterable[Document]) -> Iterator[Document]:
    """The tensors, with the parts of a state that a live optimizer keeps encoded replaced by that state."""
    for state, group in groupby(tensors, lambda t: t.get("state")):
        parts = list(group)
        if state is None:
            yield from parts
        else:
            before, after = (sum(t[size] for t in parts) for size in ("bytes_before", "bytes_after"))
            exact = all(t["codec"] == "raw" for t in parts)
            yield {**state, "bytes_before": before, "bytes_after": after, "exact": exact}


def _tensors(tensors: Sequence[Document], *, packed: bool) -> TextTable:
    """A row for each tensor."""
    head: tuple[Column, ...] = (NAME, replace(ROLE, drop=2), SHAPE, DTYPE)
    rows = [(t["name"], shown(t["role"]), shape(t), t["dtype"]) for t in tensors]
    if not packed:
        sizes = [console.size(t["bytes_before"]) for t in tensors]
        if any(t["codec"] != "raw" for t in tensors):
            held = [(t["codec"], size) for t, size in zip(tensors, sizes, strict=True)]
            return TextTable((*head, _CODEC, Column("size")), [(*row, *h) for row, h in zip(rows, held, strict=True)])
        return TextTable((*head, Column("size")), [(*row, size) for row, size in zip(rows, sizes, strict=True)])
    stored = [(*row, *_stored([t])) for row, t in zip(rows, tensors, strict=True)]
    head = (*head, _CODEC, replace(_BEFORE, drop=3), _AFTER, replace(_RATIO, drop=2))
    return _with_errors(head, stored, tensors)


def _summary(tensors: Sequence[Document], *, packed: bool) -> TextTable:
    """A row for each role and codec, or role and dtype of what is not compressed."""
    encoded = any(t["codec"] != "raw" for t in tensors)
    by_kind = groups(tensors, lambda t: (t["role"], _kind(t["codec"]) if packed else _held(t)))
    if not packed:
        sizes = [(shown(role), dtype, _how_many(role, group), _stored(group)[1]) for (role, dtype), group in by_kind]
        kind = Column("dtype or codec" if encoded else "dtype", text=True, gives="fold")
        return TextTable((ROLE, kind, Column("tensors"), Column("size")), sizes)
    rows = []
    for (role, codec), group in by_kind:
        _, *sizes_and_ratio, relative, steps = _stored(group)
        figures = (*sizes_and_ratio, _per_value(group), relative, steps)
        rows.append((shown(role), codec, _how_many(role, group), *figures))
    head = (ROLE, _CODEC, Column("tensors", drop=3), _BEFORE, _AFTER, _RATIO, Column("B/value", drop=4))
    return _with_errors(head, rows, tensors)


def _with_errors(head: Sequence[Column], rows: Sequence[tuple[str, ...]], tensors: Sequence[Document]) -> TextTable:
    """A table whose last two columns are the relative error and that in optimizer steps, where any is known."""
    if any("step_error" in (t.get("error") or {}) for t in tensors):
        return TextTable((*head, replace(ERROR, drop=1), STEP_ERROR), rows)
    return TextTable((*head, ERROR), [row[:-1] for row in rows])


def _kind(codec: str) -> str:
    """A codec without its fractions, which were fitted to one tensor: `uniform(step=2.0e-05)` -> `uniform`."""
    return _FITTED.sub("", codec).replace(",)", ")").replace("()", "")


def _held(tensor: Document) -> str:
    """The dtype of a tensor that is not compressed, or the codec in which a live optimizer keeps it."""
    return tensor["dtype"] if tensor["codec"] == "raw" else _kind(tensor["codec"])


def _rounded(codec: str) -> str:
    """A codec with its fractions to three figures."""
    return _FRACTION.sub(lambda match: f"{float(match[0]):.3g}", codec)


def _how_many(role: str, group: Sequence[Document]) -> str:
    return "-" if role in NO_TENSORS else f"{len(group):,}"


def _stored(group: Sequence[Document]) -> tuple[str, ...]:
    """Codec, bytes before and after, ratio and worst errors of tensors in one codec."""
    before, after = sum(t["bytes_before"] for t in group), sum(t["bytes_after"] for t in group)
    sizes = console.size(before), console.size(after), console.ratio(before, after)
    return _rounded(group[0].get("codec") or ""), *sizes, worst(group, "relative_rms"), worst(group, "step_error")


def _per_value(group: Sequence[Document]) -> str:
    values = sum(map(numel, group))
    return f"{sum(t['bytes_after'] for t in group) / values:.2f}" if values else "-"


def groups(
    tensors: Iterable[Document], key: Callable[[Document], tuple[str, ...]]
) -> list[tuple[tuple[str, ...], list[Document]]]:
    """Tensors by key, in the usual order of roles, then by size."""
    by_key: dict[tuple[str, ...], list[Document]] = {}
    for tensor in tensors:
        by_key.setdefault(key(tensor), []).append(tensor)
    rank = {role: i for i, role in enumerate(_ROLES)}

    def order(item: tuple[tuple[str, ...], list[Document]]) -> tuple[int, int]:
        (role, *_), group = item
        return rank.get(role, len(rank)), -sum(t.get("bytes_before", 0) for t in group)

    return sorted(by_key.items(), key=order)


def worst(group: Sequence[Document], figure: str) -> str:
    """The largest of one error figure over the group; NaN, should there be any, wins."""
    values = [float(e[figure]) for t in group if (e := t.get("error", t)) and e.get(figure) is not None]
    if not values:
        return "exact" if all(t.get("codec") == "raw" or t.get("exact") for t in group) else ""
    written = console.percent if figure == "step_error" else console.error
    return written(math.nan if any(math.isnan(v) for v in values) else max(values))


def shown(role: str) -> str:
    """A role in the words of the tables."""
    return NO_TENSORS.get(role, role)


def shape(tensor: Document) -> str:
    """512x512, or `scalar`."""
    return "x".join(str(n) for n in tensor["shape"]) or "scalar"


def numel(tensor: Document) -> int:
    """Elements of a tensor."""
    return math.prod(tensor["shape"])


def is_of_compressed(document: Document) -> bool:
    """Whether the report is of a compressed file."""
    return document.get("format_version") is not None
