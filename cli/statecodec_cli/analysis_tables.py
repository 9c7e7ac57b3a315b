"""What `analyze` and `convert` print: SNRs per tensor, what sharing would save, the curve, what a conversion lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from statecodec_cli import console, tables
from statecodec_cli.grid import Column, TextRow, TextTable

Document = Mapping[str, Any]
_WORST = "_worst_relative_rms"
_SAVED = "what rules would save of the second moments"
_PRICE = f"{_SAVED}, and how far off the Adam update would be (preset resume: 1 %)"


def analyzed(document: Document, *, every: bool = False) -> list[RenderableType]:
    """SNRs (one row per layer type, or per tensor), what rules save, and the curve."""
    parts: list[RenderableType] = []
    if document["tensors"]:
        ratios = _snr(document["tensors"], float(document["cutoff"]), every=every)
        parts += [
            _heading(document),
            ratios,
            Text(_PRICE if document.get("update_error") else _SAVED),
            _saved(document),
        ]
    if document["curve"]:
        parts += [
            Text("size at an error of weights and moments, in optimizer steps (estimated)"),
            _curve(document["curve"]),
        ]
    return [*parts, *(Text(f"note: {note}", style="yellow") for note in document["notes"])]


def converted(document: Document, *, every: bool = False) -> list[RenderableType]:
    """The file that came out, then what was lost: the Adam update's error, or the worst of each state."""
    parts = tables.inspected(document, every=every)
    total = document.get("total") or {}
    states = {k.removesuffix(_WORST): v for k, v in total.items() if k.endswith(_WORST)}
    worst = [f"{state} {console.error(v)}" for state, v in states.items()]
    parts += [Text("lost at worst: " + ", ".join(worst) + " (rel. rms)")] if worst else []
    update = total.get("worst_update_error")
    return [*parts, *([Text(f"step error: update {console.percent(update)} at worst")] if update is not None else [])]


def _heading(document: Document) -> TextRow:
    sources = document["sources"]
    name = sources[0] if len(sources) == 1 else f"{len(sources)} checkpoints"
    steps = [f"{s:g}" for s in sorted(float(s) for s in document["steps"] if s is not None)]
    shown = ", ".join(steps) if len(steps) <= 8 else f"{steps[0]} ... {steps[-1]}"
    return TextRow(
        Text(name, style="bold"),
        f"{len(document['tensors'])} second moments",
        Text(f"step{'s' if len(steps) > 1 else ''} {shown}" if steps else "", style="dim"),
    )


def _snr(tensors: Sequence[Document], cutoff: float, *, every: bool) -> RenderableType:
    dims = _dims(tensors)
    head = (
        Column("tensor" if every else "layer type", text=True, gives="middle"),
        Column("kind", text=True, drop=1),
        *(Column(f"SNR over {d}", drop=2 + d.count(",")) for d in dims),
        Column("share"),
        Column("paper", drop=1),
    )
    rows = []
    for name, group in _groups(tensors, every=every):
        first = group[0]
        cells = [_mean([t["snr"].get(d) for t in group]) for d in dims]
        shared = first["dims"] if every else first["type_dims"]
        figures = [_ratio(c, cutoff) for c in cells]
        rows.append((name, first["kind"], *figures, _named(shared), _named(first["recommended"])))
        for part in first["parts"] if every else ():
            figures = [_ratio(_mean([first["parts"][part].get(d)]), cutoff) for d in dims]
            rows.append(("  " + part.rsplit("[", 1)[-1].rstrip("]"), "", *figures, "", ""))
    return TextTable(head, rows)


def _groups(tensors: Sequence[Document], *, every: bool) -> list[tuple[str, list[Document]]]:
    """Tensors that an SNR rule may share, each for itself or by layer type."""
    groups: dict[str, list[Document]] = {}
    for tensor in tensors:
        if tensor["kind"] in ("vector", "norm"):
            continue
        words = tensor["name"].split(".")
        name = tensor["name"] if every else ".".join("*" if w.isdecimal() else w for w in words)
        groups.setdefault(name, []).append(tensor)
    return list(groups.items())


def _dims(tensors: Sequence[Document]) -> list[str]:
    dims = {d for t in tensors if t["kind"] not in ("vector", "norm") for d in t["snr"]}
    return sorted(dims, key=lambda d: (d.count(","), d))[:7]


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [float(v) for v in values if v is not None and not math.isnan(float(v))]
    return sum(numbers) / len(numbers) if numbers else None


def _ratio(value: float | None, cutoff: float) -> str:
    if value is None:
        return ""
    return f"{value:.3g}{' *' if value > cutoff else '  '}"


def _named(dims: Sequence[int] | None) -> str:
    if dims is None:
        return "-"
    return ",".join(map(str, dims)) if dims else "keep"


def _saved(document: Document) -> TextTable:
    """What rules save of the second moments, and what that does to the Adam update, where it was measured."""
    rules = (("layer", "by layer"), ("type", "by layer type"), ("table", "the paper's table"))
    errors = document.get("update_error") or {}
    heads = [Column(f"rules at SNR > {document['cutoff']:g}", text=True), Column("saved")]
    heads += [Column("update, of a step")] if errors else []
    rows = []
    for basis, name in rules:
        error = [console.percent(errors[basis])] if errors else []
        rows.append((name, f"{100 * float(document['saved'][basis]):.1f} %", *error))
    return TextTable(heads, rows)


def _curve(curve: Sequence[Document]) -> RenderableType:
    """The estimated size at some step errors, and at those of the presets."""
    errors = ("step_error", "weight_step_error")
    rows = [(*(console.percent(p[k]) for k in errors), f"{p['bytes_per_param']:.3f}", p["label"] or "") for p in curve]
    heads = [Column("update, of a step"), Column("weights, of a step"), Column("B/param"), Column("preset", text=True)]
    return TextTable(heads, rows)
