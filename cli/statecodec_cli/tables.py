"""Reports as tables on standard output.

Input is always the JSON document, so what is shown is what --json gives. A figure that JSON cannot hold comes as text
("nan", "inf"), which float() reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from statecodec_cli import console
from statecodec_cli.grid import Column, TextRow, TextTable
from statecodec_cli.tensor_tables import (
    DTYPE,
    ERROR,
    NAME,
    NO_TENSORS,
    ROLE,
    SHAPE,
    STEP_ERROR,
    body,
    groups,
    is_of_compressed,
    numel,
    shape,
    worst,
)

Document = Mapping[str, Any]
_MANY_NOTES = 12
_MANY_VALUES = 12
_LAYOUTS = {"torch_zip": "torch.save file", "safetensors": "safetensors file", "native": "saved by statecodec.save"}

_Rows = list[tuple[tuple[str, ...], list[Document]]]  # leading cells, and the tensors whose errors follow
_DISTANCES = {
    "relative_rms": ERROR, "max_abs": Column("largest"), "step_error": STEP_ERROR,
    "differing": Column("elements that differ"),
}  # fmt: skip
_UPDATE = (STEP_ERROR, Column("max |u|"), Column("exact max |u|", drop=2), Column("cosine", drop=1))


def compressed(document: Document, *, every: bool = False) -> list[RenderableType]:
    """What `compress` did: one headline, then sizes and errors by role and codec."""
    source, before, after = document["source"], document["source"]["bytes"], document["bytes"]
    elapsed = document.get("seconds") or 0.0
    line = TextRow(
        Text.assemble((str(source.get("name", "")), "bold"), f"  {console.size(before)}"),
        Text.assemble("->  ", (str(document["path"]), "bold"), f"  {console.size(after)}"),
        Text(console.ratio(before, after), style="bold green"),
        _per_param(document),
        Text(f"{console.seconds(elapsed)}, {console.size(before / elapsed)}/s" if elapsed else "", style="dim"),
    )
    grew = "note: larger than the original: nothing in it packs, or it is too small for a header"
    return [
        line,
        body(document, every=every),
        *_updates(document),
        *([Text(grew, style="yellow")] if after > before else []),
        *_imports(document, harmless=False),
        *_notes(document),
    ]


def share(document: Document) -> RenderableType:
    """What `compress --shard` did."""
    remark = "" if document["made"] else "it was there already"
    return TextRow(
        Text.assemble(f"share {document['share']}: ", (str(document["path"]), "bold")),
        Text(f"{console.size(document['bytes'])}, {document['items']:,} items"),
        Text(remark or console.seconds(document["seconds"]), style="dim"),
    )


def inspected(document: Document, *, every: bool = False) -> list[RenderableType]:
    """What `inspect` found."""
    source, after = document["source"], document["bytes"]
    facts: list[Text | str] = [
        Text.assemble((str(document.get("path") or source.get("name", "")), "bold"), f"  {console.size(after)}")
    ]
    kind = layout(source)
    if is_of_compressed(document):
        facts.append(f"from {source.get('name', 'a checkpoint')}, {kind}, {console.size(source['bytes'])}")
        facts.append(Text(console.ratio(source["bytes"], after), style="bold green"))
    else:
        facts.append(kind)
    details = [f"{document['num_params']:,} parameters", f"{_count(document):,} tensors"]
    if promise := _promise(document):
        details.append(promise)
    if document.get("format_version"):
        details.append("format " + ".".join(str(n) for n in document["format_version"]))
    if source.get("sha256"):
        details.append(f"SHA-256 of the original {source['sha256']}")
    return [
        TextRow(*facts, _per_param(document)),
        TextRow(*(Text(detail, style="dim") for detail in details)),
        body(document, every=every),
        *_updates(document),
        *_imports(document),
        *_notes(document),
    ]


def layout(source: Document) -> str:
    """What kind of checkpoint the original is, in words."""
    if source.get("framework"):
        return str(source["framework"])
    name = str(source.get("layout") or "")
    return _LAYOUTS.get(name, name.replace("_", " "))


def restored(document: Document) -> list[RenderableType]:
    """What `restore` wrote, and how close it is."""
    elapsed, lossy = document.get("seconds"), sum(bool(t.get("error")) for t in document["tensors"])
    exact = not lossy and all(t["codec"] in ("raw", "delta") for t in document["tensors"])
    has_digest = exact and document["source"].get("sha256")
    line = TextRow(
        Text.assemble((str(document["path"]), "bold"), f"  {console.size(document['source']['bytes'])}"),
        Text("the same SHA-256 as the original", style="green") if has_digest else "",
        f"{lossy:,} of {_count(document):,} tensors within the errors that `inspect` shows" if lossy else "",
        Text(console.seconds(elapsed) if elapsed else "", style="dim"),
    )
    return [line, *_notes(document)]


def verified(document: Document, *, against: bool) -> list[RenderableType]:
    """That `verify` found nothing wrong."""
    verdict = "intact"
    if against and document["source"].get("sha256"):
        verdict = "intact, made of this very file (the same SHA-256), and within its stated errors of it"
    elif against:
        verdict = "intact, and within its stated errors of the original"
    line = TextRow(
        Text.assemble(("ok  ", "bold green"), (str(document["path"]), "bold")),
        verdict,
        _promise(document),
        f"{_count(document):,} tensors, {console.size(document['bytes'])} checked",
    )
    return [line, *_updates(document), *_notes(document)]


def difference(document: Document, *, every: bool = False) -> list[RenderableType]:
    """Errors by role (or by tensor), then those of the Adam updates, and what is equal or different otherwise."""
    tensors = document["tensors"]
    columns: tuple[Column, ...] = (ROLE, Column("tensors", drop=2), Column("values", drop=1))
    if every:
        columns = (NAME, replace(ROLE, drop=1), SHAPE, DTYPE)
        rows: _Rows = [((t["name"], t["role"], shape(t), t["dtype"]), [t]) for t in tensors]
    else:
        rows = [
            ((role, f"{len(group):,}", f"{sum(map(numel, group)):,}"), group)
            for (role,), group in groups(tensors, lambda t: (t["role"],))
        ]
    shown = {name: column for name, column in _DISTANCES.items() if any(t.get(name) is not None for t in tensors)}
    if not any(t.get("differing") for t in tensors):
        shown.pop("differing", None)
    cells = [(*head, *(_distance(group, name) for name in shown)) for head, group in rows]
    parts: list[RenderableType] = [TextTable((*columns, *shown.values()), cells)] if rows else []
    updates = document.get("updates") or []
    if updates and every:
        names = (Column("Adam update of", text=True, gives="middle"), *_UPDATE)
        parts.append(TextTable(names, [(u["param"] or "?", *update_cells(u)) for u in updates]))
    return [*parts, *_updates(document), *_one_sided(document), *_equality(document), *_values(document, every=every),
            *_notes(document)]  # fmt: skip


def _distance(group: Sequence[Document], figure: str) -> str:
    """One figure of how far apart tensors are; integers have nothing but the number of elements that differ."""
    if figure == "differing":
        differing = sum(t.get(figure) or 0 for t in group)
        return f"{differing:,}" if differing else ""
    numbers = [t for t in group if not t.get("differing")]
    return worst(numbers, figure) if numbers else ""


def _one_sided(document: Document) -> list[Text]:
    """What the figures do not include: tensors without a counterpart, elements that are NaN or infinite on one side."""
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
        heading = "what is not a tensor differs (settings, counters, metadata, other files): "
        lines.append(Text(heading + _some(rest), style="yellow"))
    return lines


def _values(document: Document, *, every: bool) -> list[RenderableType]:
    """The settings and counters that differ."""
    values = document.get("values") or []
    if not values:
        return []
    listed = values if every else values[:_MANY_VALUES]
    head = (Column("value", text=True, gives="middle"), *(Column(side, text=True, gives="fold") for side in "AB"))
    more = [Text(f"and {len(values) - len(listed):,} more; --all lists them", style="dim")] if listed != values else []
    return [TextTable(head, [(v["name"], v["a"], v["b"]) for v in listed]), *more]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def update_cells(update: Document) -> tuple[str, str, str, str]:
    """The step error of one Adam update (its u-rms), max |u|, exact max |u| and cosine, as text."""
    cosine = update.get("cosine")
    return (
        console.percent(update.get("u_rms")),
        _number(update.get("max_u")),
        _number(update.get("max_u_exact")),
        "" if cosine is None else f"{float(cosine):.6f}",
    )


def _updates(document: Document) -> list[TextRow]:
    """The step errors in total and what else is known of the Adam updates, where the document states them."""
    total, lines = document.get("total") or {}, []
    errors = console.step_errors(total, document.get("asked"))
    if errors:
        words = [
            Text.assemble(f"{what} ", (error, "bold"), f" {asked}" if asked else "") for what, error, asked in errors
        ]
        lines.append(TextRow("step error:", *(word.append(",") for word in words[:-1]), words[-1], gap=1))
    _, largest, exact, cosine = update_cells(total)
    if largest:
        count = len(document.get("updates") or ())
        more = Text(f"over {count:,} parameter{'s' if count > 1 else ''}" if count else "", style="dim")
        bold = Text.assemble("Adam update: max |u| ", (largest, "bold"), f" (exact {exact})")
        lines.append(TextRow(bold, f"cosine {cosine}" if cosine else "", more))
    return lines


def _promise(document: Document) -> str:
    """The errors that the file was made to keep to, in words; "" where they are not known."""
    worst = console.worst_weight((t["role"], t.get("error")) for t in document["tensors"])
    return console.asked(document.get("preset"), document.get("asked"), worst)


def _imports(document: Document, *, harmless: bool = True) -> list[Text]:
    """What unpickling each file would run; where that is nothing, in one line how much was looked at."""
    lines, pickles = [], document.get("pickles") or []
    for pickle in pickles:
        if pickle["can_run_code"]:
            words = f"unpickling {pickle['file']} would import what can run code: {_some(pickle['can_run_code'])}"
            lines.append(Text(words, style="bold red"))
        elif pickle["unread"]:
            words = f"what unpickling {pickle['file']} would run cannot be told: {pickle['unread']}"
            lines.append(Text(words, style="bold red"))
    if pickles and not lines and harmless:
        names = {name for pickle in pickles for name in pickle["globals"]}
        words = f"unpickling it would import {len(names):,} names, none of which can run code"
        return [Text(words, style="green")]
    more = f"and {len(lines) - _MANY_NOTES:,} more files; --json lists all"
    return [*lines[:_MANY_NOTES], *([Text(more, style="dim")] if len(lines) > _MANY_NOTES else [])]


def _notes(document: Document) -> list[Text]:
    notes = document.get("notes") or []
    lines = [Text(f"note: {note}", style="yellow") for note in notes[:_MANY_NOTES]]
    if len(notes) > _MANY_NOTES:
        lines.append(Text(f"and {len(notes) - _MANY_NOTES:,} more notes; --json lists all", style="dim"))
    return lines


def _per_param(document: Document) -> str:
    per_param = document.get("bytes_per_param")
    return f"{per_param:.2f} B/param" if per_param else ""


def _number(value: float | str | None) -> str:
    return "" if value is None else f"{float(value):.4g}"


def _count(document: Document) -> int:
    return sum(t["role"] not in NO_TENSORS for t in document["tensors"])
