"""Reports as tables on standard output.

Input is always the JSON document, so what is shown is what --json gives. A figure that JSON cannot hold comes as text
("nan", "inf"), which float() reads.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from statecodec_cli import console

Document = Mapping[str, Any]
_MANY = 400  # rows; more are cut with a remark, --json has them all
_ROLES = ("weight", "master", "ema", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum", "step", "other", "skeleton")


def compressed(document: Document, *, every: bool = False) -> list[RenderableType]:
    """What `compress` did: one headline, then sizes and errors by role and codec."""
    source, before, after = document["source"], document["source"]["bytes"], document["bytes"]
    elapsed = document.get("seconds") or 0.0
    line = Text.assemble(
        (str(source.get("name", "")), "bold"), f"  {console.size(before)}  ->  ",
        (str(document["path"]), "bold"), f"  {console.size(after)}   ",
        (console.ratio(before, after), "bold green"), _per_param(document),
    )  # fmt: skip
    if elapsed:
        line.append(f"   {console.seconds(elapsed)}, {console.size(before / elapsed)}/s", style="dim")
    return [line, _body(document, every=every), *_updates(document), *_notes(document)]


def inspected(document: Document, *, every: bool = False) -> list[RenderableType]:
    """What `inspect` found."""
    source, after = document["source"], document["bytes"]
    line = Text.assemble((str(document.get("path") or source.get("name", "")), "bold"), f"  {console.size(after)}")
    if _is_compressed(document):
        line.append(f"  from {source.get('name', 'a')} {source.get('layout', '')} {console.size(source['bytes'])}   ")
        line.append(console.ratio(source["bytes"], after), style="bold green")
    else:
        line.append(f"  {source.get('layout', '')}")
    line.append(_per_param(document))
    facts = [f"{document['num_params']:,} parameters", f"{_count(document):,} tensors"]
    if document.get("preset"):
        facts.append(f"preset {document['preset']}")
    if document.get("format_version"):
        facts.append("format " + ".".join(str(n) for n in document["format_version"]))
    if source.get("sha256"):
        facts.append(f"sha256 of the original {source['sha256']}")
    body = _body(document, every=every)
    return [line, Text("  ".join(facts), style="dim"), body, *_updates(document), *_notes(document)]


def restored(document: Document) -> list[RenderableType]:
    """What `restore` wrote."""
    line = Text.assemble(
        ("restored ", "green"), (str(document["path"]), "bold"), f"  {console.size(document['source']['bytes'])}"
    )
    if document.get("seconds"):
        line.append(f"   {console.seconds(document['seconds'])}", style="dim")
    return [line, *_notes(document)]


def verified(document: Document, *, against: bool) -> list[RenderableType]:
    """That `verify` found nothing wrong."""
    what = "intact, and within its stated errors of the original" if against else "intact"
    line = Text.assemble(
        ("ok ", "bold green"), (str(document["path"]), "bold"),
        f"  {what}: {_count(document):,} tensors, {console.size(document['bytes'])} checked",
    )  # fmt: skip
    return [line, *_notes(document)]


def difference(document: Document, *, every: bool = False) -> list[RenderableType]:
    """Errors by role (or by tensor), then the error of the Adam update, and what is equal or differs besides."""
    tensors = document["tensors"]
    columns: tuple[str, ...] = ("role", "tensors", "values", "relative rms, worst", "largest difference")
    if every:
        columns = ("tensor", "role", "shape", "dtype", "relative rms", "largest difference")
        rows: list[tuple[str, ...]] = [(t["name"], t["role"], _shape(t), t["dtype"], *_distance([t])) for t in tensors]
    else:
        rows = [
            (role, f"{len(group):,}", f"{sum(map(_numel, group)):,}", *_distance(group))
            for (role,), group in _groups(tensors, lambda t: (t["role"],))
        ]
    if any(t.get("differing") for t in tensors):
        columns = (*columns, "elements that differ")
    else:
        rows = [row[:-1] for row in rows]
    parts: list[RenderableType] = [table(columns, rows, left=4 if every else 1)]
    updates = document.get("updates") or []
    if updates and every:
        names = ("Adam update of", "u-rms", "max |u|", "exact max |u|", "cosine")
        parts.append(table(names, [(u["param"] or "?", *update_cells(u)) for u in updates]))
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


def codecs(document: Document) -> list[RenderableType]:
    """The codecs with their fields, then the presets with their rules."""
    rows = []
    for codec in document["codecs"]:
        fields = ",".join(f"{name}={default}" for name, default in codec["fields"].items())
        rows.append((codec["name"], f"{codec['name']}({fields})" if fields else codec["name"], codec["summary"]))
    presets = [
        (name, "\n".join(rules) if rules else "everything exact, losslessly packed")
        for name, rules in document["presets"].items()
    ]
    return [
        table(("codec", "fields and defaults", "what it is"), rows, left=3, fold=2),
        table(("preset", "rules, first match wins; what no rule names stays exact"), presets, left=2, fold=1),
    ]


def _body(document: Document, *, every: bool) -> Table:
    tensors, packed = document["tensors"], _is_compressed(document)
    if every:
        head: tuple[str, ...] = ("tensor", "role", "shape", "dtype", "codec", "before", "after", "ratio", "rel. error")
        rows: list[tuple[str, ...]] = [
            (t["name"], t["role"], _shape(t), t["dtype"], t.get("codec") or "",
             console.size(t["bytes_before"]), console.size(t["bytes_after"]),
             console.ratio(t["bytes_before"], t["bytes_after"]), _worst([t], "relative_rms"))
            for t in tensors
        ]  # fmt: skip
        if packed:
            return table(head, rows, left=5)
        return _columns(("tensor", "role", "shape", "dtype", "codec", "size"), rows, keep=(0, 1, 2, 3, 5), left=4)
    head = ("role", "codec", "tensors", "before", "after", "ratio", "B/value", "rel. error")
    groups = _groups(tensors, lambda t: (t["role"], t["codec"] if packed else t["dtype"]))
    rows = [_summary(key, group) for key, group in groups]
    if packed:
        return table(head, rows, left=2, fold=1)
    return _columns(("role", "dtype", "tensors", "size"), rows, keep=(0, 1, 2, 3), left=2)


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, keep: Sequence[int], left: int) -> Table:
    return table([head[i] for i in keep], [[row[i] for i in keep] for row in rows], left=left)


def _summary(key: tuple[str, ...], group: Sequence[Document]) -> tuple[str, ...]:
    before, after = sum(t["bytes_before"] for t in group), sum(t["bytes_after"] for t in group)
    numel = sum(map(_numel, group))
    return (
        *key, f"{len(group):,}", console.size(before), console.size(after), console.ratio(before, after),
        f"{after / numel:.2f}" if numel else "-", _worst(group, "relative_rms"),
    )  # fmt: skip


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


def _updates(document: Document) -> list[Text]:
    """The error of the Adam update in total, where the document states it."""
    total = document.get("total") or {}
    if total.get("u_rms") is None:
        return []
    rms, largest, exact, cosine = update_cells(total)
    line = Text.assemble("Adam update  u-rms ", (rms, "bold"), "   max |u| ", (largest, "bold"), f" (exact {exact})")
    line.append(f"   cosine {cosine}" if cosine else "")
    line.append(f"   over {len(document['updates']):,} parameters" if document.get("updates") else "", style="dim")
    return [line]


def _notes(document: Document) -> list[Text]:
    return [Text(f"note: {note}", style="yellow") for note in document.get("notes") or []]


def _is_compressed(document: Document) -> bool:
    return document.get("format_version") is not None


def _per_param(document: Document) -> str:
    per_param = document.get("bytes_per_param")
    return f"   {per_param:.2f} B/param" if per_param else ""


def _number(value: float | str | None) -> str:
    return "" if value is None else f"{float(value):.4g}"


def _count(document: Document) -> int:
    """Tensors: the skeleton (everything in the source that is none) is listed with them but is no tensor."""
    return sum(t["role"] != "skeleton" for t in document["tensors"])


def _shape(tensor: Document) -> str:
    return "x".join(str(n) for n in tensor["shape"]) or "scalar"


def _numel(tensor: Document) -> int:
    return math.prod(tensor["shape"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, fold: int | None = None) -> Table:
    """A table whose first `left` columns are text and whose others are figures.

    Where the terminal is too narrow, column `fold` is folded; without one the lines run over, one row a line.
    """
    made = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline", title=" ", title_justify="left"
    )
    for i, name in enumerate(head):
        made.add_column(name, justify="left" if i < left else "right", no_wrap=i != fold, overflow="fold")
    for row in rows[:_MANY]:
        made.add_row(*(Text(str(cell)) for cell in row))
    made.caption = f"{len(rows) - _MANY:,} more; --json lists all" if len(rows) > _MANY else " "
    made.caption_justify = "left"
    if fold is None:
        made.width = Console(width=100_000, file=io.StringIO()).measure(made).maximum
    return made
