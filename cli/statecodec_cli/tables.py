"""Reports as tables on standard output.

Input is always the JSON document, so what is shown is what --json gives. A figure that JSON cannot hold comes as text
("nan", "inf"), which float() reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from statecodec_cli import console
from statecodec_cli.grid import Column, Facts, Grid

Document = Mapping[str, Any]
_ROLES = (
    "weight", "master", "ema", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum", "step", "other", "skeleton",
    "file",
)  # fmt: skip
_NO_TENSORS = {"skeleton": "not tensors", "file": "other files"}  # listed under these names, but not counted
_MANY_NOTES = 12
_FRACTION = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+")
_FITTED = re.compile(rf"\w+=(?:{_FRACTION.pattern})(?:,|(?=\)))")
_LAYOUTS = {"torch_zip": "torch.save file", "safetensors": "safetensors file", "native": "saved by statecodec.save"}

_NAME = Column("tensor", text=True, gives="middle")
_ROLE, _SHAPE, _DTYPE = (
    Column("role", text=True),
    Column("shape", text=True, drop=4),
    Column("dtype", text=True, drop=5),
)
_CODEC = Column("codec", text=True, gives="fold")
_BEFORE, _AFTER, _RATIO = Column("before", drop=2), Column("after"), Column("ratio")
_ERROR = Column("rel. rms")
_UPDATE = (Column("u-rms"), Column("max |u|"), Column("exact max |u|", drop=2), Column("cosine", drop=1))


def compressed(document: Document, *, every: bool = False) -> list[RenderableType]:
    """What `compress` did: one headline, then sizes and errors by role and codec."""
    source, before, after = document["source"], document["source"]["bytes"], document["bytes"]
    elapsed = document.get("seconds") or 0.0
    line = Facts(
        Text.assemble((str(source.get("name", "")), "bold"), f"  {console.size(before)}"),
        Text.assemble("->  ", (str(document["path"]), "bold"), f"  {console.size(after)}"),
        Text(console.ratio(before, after), style="bold green"),
        _per_param(document),
        Text(f"{console.seconds(elapsed)}, {console.size(before / elapsed)}/s" if elapsed else "", style="dim"),
    )
    grew = "note: larger than the original: nothing in it packs, or it is too small for a header"
    return [
        line,
        _body(document, every=every),
        *_updates(document),
        *([Text(grew, style="yellow")] if after > before else []),
        *_notes(document),
    ]


def inspected(document: Document, *, every: bool = False) -> list[RenderableType]:
    """What `inspect` found."""
    source, after = document["source"], document["bytes"]
    facts: list[Text | str] = [
        Text.assemble((str(document.get("path") or source.get("name", "")), "bold"), f"  {console.size(after)}")
    ]
    kind = layout(source)
    if _is_compressed(document):
        facts.append(f"from {source.get('name', 'a checkpoint')}, {kind}, {console.size(source['bytes'])}")
        facts.append(Text(console.ratio(source["bytes"], after), style="bold green"))
    else:
        facts.append(kind)
    details = [f"{document['num_params']:,} parameters", f"{_count(document):,} tensors"]
    if document.get("preset"):
        details.append(f"preset {document['preset']}")
    if document.get("format_version"):
        details.append("format " + ".".join(str(n) for n in document["format_version"]))
    if source.get("sha256"):
        details.append(f"SHA-256 of the original {source['sha256']}")
    return [
        Facts(*facts, _per_param(document)),
        Facts(*(Text(detail, style="dim") for detail in details)),
        _body(document, every=every),
        *_updates(document),
        *_notes(document),
    ]


def layout(source: Document) -> str:
    """What kind of checkpoint the original is, in words."""
    name = str(source.get("layout") or "")
    return _LAYOUTS.get(name, name.replace("_", " "))


def restored(document: Document) -> list[RenderableType]:
    """What `restore` wrote, and how close it is."""
    elapsed, lossy = document.get("seconds"), sum(bool(t.get("error")) for t in document["tensors"])
    exact = not lossy and all(t["codec"] in ("raw", "delta") for t in document["tensors"])
    known = exact and document["source"].get("sha256")
    line = Facts(
        Text.assemble((str(document["path"]), "bold"), f"  {console.size(document['source']['bytes'])}"),
        Text("the same SHA-256 as the original", style="green") if known else "",
        f"{lossy:,} of {_count(document):,} tensors within the errors that `inspect` shows" if lossy else "",
        Text(console.seconds(elapsed) if elapsed else "", style="dim"),
    )
    return [line, *_notes(document)]


def verified(document: Document, *, against: bool) -> list[RenderableType]:
    """That `verify` found nothing wrong."""
    what = "intact, and within its stated errors of the original" if against else "intact"
    line = Facts(
        Text.assemble(("ok  ", "bold green"), (str(document["path"]), "bold")),
        what,
        f"{_count(document):,} tensors, {console.size(document['bytes'])} checked",
    )
    return [line, *_updates(document), *_notes(document)]


def difference(document: Document, *, every: bool = False) -> list[RenderableType]:
    """Errors by role (or by tensor), then the error of the Adam update, and what is equal or differs besides."""
    tensors = document["tensors"]
    columns: tuple[Column, ...] = (_ROLE, Column("tensors", drop=2), Column("values", drop=1))
    if every:
        columns = (_NAME, replace(_ROLE, drop=1), _SHAPE, _DTYPE)
        rows: list[tuple[str, ...]] = [(t["name"], t["role"], _shape(t), t["dtype"], *_distance([t])) for t in tensors]
    else:
        rows = [
            (role, f"{len(group):,}", f"{sum(map(_numel, group)):,}", *_distance(group))
            for (role,), group in _groups(tensors, lambda t: (t["role"],))
        ]
    columns = (*columns, _ERROR, Column("largest"))
    if any(t.get("differing") for t in tensors):
        columns = (*columns, Column("elements that differ"))
    else:
        rows = [row[:-1] for row in rows]
    parts: list[RenderableType] = [Grid(columns, rows)] if rows else []
    updates = document.get("updates") or []
    if updates and every:
        names = (Column("Adam update of", text=True, gives="middle"), *_UPDATE)
        parts.append(Grid(names, [(u["param"] or "?", *update_cells(u)) for u in updates]))
    return [*parts, *_updates(document), *_one_sided(document), *_equality(document), *_notes(document)]


def _distance(group: Sequence[Document]) -> tuple[str, str, str]:
    """Relative rms, largest difference and number of elements that differ; the last is all there is for integers."""
    numbers = [t for t in group if not t.get("differing")]
    differing = sum(t.get("differing") or 0 for t in group)
    if not numbers:
        return "", "", f"{differing:,}"
    return _worst(numbers, "relative_rms"), _worst(numbers, "max_abs"), f"{differing:,}" if differing else ""


def _one_sided(document: Document) -> list[Text]:
    """What the figures cannot say: tensors without a counterpart, elements that are NaN or infinite on one side."""
    lines = []
    for side in ("a", "b"):
        names = document.get(f"only_in_{side}") or []
        if names:
            lines.append(Text(f"only in {document[side]}: {_some(names)}", style="yellow"))
    odd = sum(t.get("mismatched") or 0 for t in document["tensors"])
    if odd:
        lines.append(Text(f"{odd:,} elements are NaN or infinite on one side only", style="bold red"))
    return lines


def _equality(document: Document) -> list[Text]:
    """What is the same: every byte, or every number; and where the bytes beside the tensors differ."""
    if document["identical"]:
        return [Text("identical: every byte, of tensors and of everything else", style="green")]
    lines = [Text("every tensor is equal", style="green")] if document["tensors_equal"] else []
    others = sum(not t["identical"] for t in document["tensors"])
    if lines and others:
        lines[0].append(f"; {others:,} of them in other bits: another dtype, zeros of another sign, or other NaNs")
    rest = document["rest_differs"]
    if rest:
        what = "what is not a tensor differs (settings, counters, metadata, other files): "
        lines.append(Text(what + _some(rest), style="yellow"))
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _body(document: Document, *, every: bool) -> Grid:
    tensors, packed = document["tensors"], _is_compressed(document)
    return _tensors(tensors, packed=packed) if every else _summary(tensors, packed=packed)


def _tensors(tensors: Sequence[Document], *, packed: bool) -> Grid:
    """A row for each tensor."""
    head: tuple[Column, ...] = (_NAME, replace(_ROLE, drop=2), _SHAPE, _DTYPE)
    rows = [(t["name"], _shown(t["role"]), _shape(t), t["dtype"]) for t in tensors]
    if not packed:
        sizes = [console.size(t["bytes_before"]) for t in tensors]
        return Grid((*head, Column("size")), [(*row, size) for row, size in zip(rows, sizes, strict=True)])
    stored = [(*row, *_stored([t])) for row, t in zip(rows, tensors, strict=True)]
    head = (*head, _CODEC, replace(_BEFORE, drop=3), _AFTER, replace(_RATIO, drop=2))
    return _with_errors(head, stored, tensors)


def _summary(tensors: Sequence[Document], *, packed: bool) -> Grid:
    """A row for each role and codec, or role and dtype of what is not compressed."""
    groups = _groups(tensors, lambda t: (t["role"], _kind(t["codec"]) if packed else t["dtype"]))
    if not packed:
        sizes = [(_shown(role), dtype, _how_many(role, group), _stored(group)[1]) for (role, dtype), group in groups]
        return Grid((_ROLE, Column("dtype", text=True), Column("tensors"), Column("size")), sizes)
    rows = []
    for (role, codec), group in groups:
        _, *sizes_and_ratio, relative, steps = _stored(group)
        figures = (*sizes_and_ratio, _per_value(group), relative, steps)
        rows.append((_shown(role), codec, _how_many(role, group), *figures))
    head = (_ROLE, _CODEC, Column("tensors", drop=3), _BEFORE, _AFTER, _RATIO, Column("B/value", drop=4))
    return _with_errors(head, rows, tensors)


def _with_errors(head: Sequence[Column], rows: Sequence[tuple[str, ...]], tensors: Sequence[Document]) -> Grid:
    """A table whose last two columns are the relative error and that in optimizer steps, where any is known."""
    if any("step_error" in (t.get("error") or {}) for t in tensors):
        return Grid((*head, replace(_ERROR, drop=1), Column("in steps")), rows)
    return Grid((*head, _ERROR), [row[:-1] for row in rows])


def _kind(codec: str) -> str:
    """A codec without what was fitted to one tensor, which is a fraction: `uniform(step=2.0e-05)` -> `uniform`."""
    return _FITTED.sub("", codec).replace(",)", ")").replace("()", "")


def _rounded(codec: str) -> str:
    """A codec with its fractions to three figures."""
    return _FRACTION.sub(lambda found: f"{float(found[0]):.3g}", codec)


def _how_many(role: str, group: Sequence[Document]) -> str:
    return "-" if role in _NO_TENSORS else f"{len(group):,}"


def _stored(group: Sequence[Document]) -> tuple[str, ...]:
    """Codec, bytes before and after, ratio and worst errors of tensors in one codec."""
    before, after = sum(t["bytes_before"] for t in group), sum(t["bytes_after"] for t in group)
    sizes = console.size(before), console.size(after), console.ratio(before, after)
    return _rounded(group[0].get("codec") or ""), *sizes, _worst(group, "relative_rms"), _worst(group, "step_error")


def _per_value(group: Sequence[Document]) -> str:
    numel = sum(map(_numel, group))
    return f"{sum(t['bytes_after'] for t in group) / numel:.2f}" if numel else "-"


def _groups(
    tensors: Iterable[Document], key: Callable[[Document], tuple[str, ...]]
) -> list[tuple[tuple[str, ...], list[Document]]]:
    """Tensors by key, in the order of roles people think in, then by size."""
    found: dict[tuple[str, ...], list[Document]] = {}
    for tensor in tensors:
        found.setdefault(key(tensor), []).append(tensor)
    rank = {role: i for i, role in enumerate(_ROLES)}

    def order(item: tuple[tuple[str, ...], list[Document]]) -> tuple[int, int]:
        (role, *_), group = item
        return rank.get(role, len(rank)), -sum(t.get("bytes_before", 0) for t in group)

    return sorted(found.items(), key=order)


def _worst(group: Sequence[Document], figure: str) -> str:
    """The largest of one error figure over the group; NaN, should there be any, wins."""
    values = [float(e[figure]) for t in group if (e := t.get("error", t)) and e.get(figure) is not None]
    if not values:
        return "exact" if all(t.get("codec") == "raw" for t in group) else ""
    return console.error(math.nan if any(math.isnan(v) for v in values) else max(values))


def update_cells(update: Document) -> tuple[str, str, str, str]:
    """u-rms, max |u|, exact max |u| and cosine of one Adam update, as text."""
    cosine = update.get("cosine")
    return (
        console.error(update.get("u_rms")),
        _number(update.get("max_u")),
        _number(update.get("max_u_exact")),
        "" if cosine is None else f"{float(cosine):.6f}",
    )


def _updates(document: Document) -> list[Facts]:
    """The error of the Adam update in total, where the document states it."""
    total = document.get("total") or {}
    if total.get("u_rms") is None:
        return []
    rms, largest, exact, cosine = update_cells(total)
    count = len(document.get("updates") or ())
    weights = total.get("weight_step_error")
    line = Facts(
        Text.assemble("Adam update  u-rms ", (rms, "bold")),
        Text.assemble("weights ", (console.error(weights), "bold"), " of a step" if weights else "")
        if weights is not None
        else "",
        Text.assemble("max |u| ", (largest, "bold"), f" (exact {exact})") if largest else "",
        f"cosine {cosine}" if cosine else "",
        Text(f"over {count:,} parameter{'s' if count > 1 else ''}" if count else "", style="dim"),
    )
    return [line]


def _shown(role: str) -> str:
    return _NO_TENSORS.get(role, role)


def _notes(document: Document) -> list[Text]:
    notes = document.get("notes") or []
    lines = [Text(f"note: {note}", style="yellow") for note in notes[:_MANY_NOTES]]
    if len(notes) > _MANY_NOTES:
        lines.append(Text(f"and {len(notes) - _MANY_NOTES:,} more notes; --json lists all", style="dim"))
    return lines


def _is_compressed(document: Document) -> bool:
    return document.get("format_version") is not None


def _per_param(document: Document) -> str:
    per_param = document.get("bytes_per_param")
    return f"{per_param:.2f} B/param" if per_param else ""


def _number(value: float | str | None) -> str:
    return "" if value is None else f"{float(value):.4g}"


def _count(document: Document) -> int:
    return sum(t["role"] not in _NO_TENSORS for t in document["tensors"])


def _shape(tensor: Document) -> str:
    return "x".join(str(n) for n in tensor["shape"]) or "scalar"


def _numel(tensor: Document) -> int:
    return math.prod(tensor["shape"])
