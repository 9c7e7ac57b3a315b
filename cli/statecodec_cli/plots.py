"""Reports as figures: sizes by role and codec, error by tensor. matplotlib's object API; nothing global is touched."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statecodec_cli import console

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Document = Mapping[str, Any]

_RELATIVE = "Relative rms error, one dot per tensor"
_IN_STEPS = "Error in optimizer steps, one dot per tensor"
INK, QUIET, GRID, PAPER = "#1f2933", "#7b8794", "#e4e7eb", "#ffffff"
BEFORE = "#cbd2d9"
ROLES = {  # one colour a role, told apart by every common kind of colour vision (after Okabe and Ito)
    "weight": "#0072b2", "master": "#0072b2", "ema": "#0072b2", "exp_avg": "#e69f00", "exp_avg_sq": "#009e73",
    "max_exp_avg_sq": "#56b4e9", "momentum": "#d55e00", "step": "#999999", "other": "#999999",
}  # fmt: skip
STYLE: Any = {
    "font.family": "sans-serif", "font.size": 9.0, "text.color": INK, "axes.labelcolor": QUIET, "axes.edgecolor": GRID,
    "xtick.color": QUIET, "ytick.color": INK, "axes.titlesize": 10.0, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10.0, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "x", "grid.color": GRID, "axes.axisbelow": True,
    "xtick.major.size": 0, "xtick.minor.size": 0, "ytick.major.size": 0, "svg.fonttype": "none",
    "svg.hashsalt": "statecodec",
}  # fmt: skip


def require(path: Path | None) -> None:
    """Refuse before the work starts: a suffix that is neither .svg nor .png, or no matplotlib. Raises UsageError."""
    if path is None:
        return
    from statecodec.errors import UsageError

    if path.suffix.lower() not in (".svg", ".png"):
        raise UsageError(f"--plot {path}: the name must end in .svg or .png")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'statecodec[plot]'")


def save(figure: Figure, path: Path) -> None:
    """Write the figure, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    suffix = path.suffix.lower()[1:]
    try:
        from matplotlib import rc_context

        with rc_context(STYLE):
            metadata = {"Date": None} if suffix == "svg" else {}
            figure.savefig(temporary, format=suffix, dpi=160, facecolor=PAPER, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def report(document: Document) -> Figure:
    """Sizes by role and codec, before and after; below it the errors of every tensor not kept exactly."""
    from matplotlib import rc_context

    packed = document.get("format_version") is not None
    rows = _size_rows(document["tensors"], packed=packed)
    errors = _errors(document["tensors"]) if packed else {}
    with rc_context(STYLE):
        figure, axes = _canvas(max(1.6, 0.42 * len(rows) + 0.9), *(0.42 * len(e) + 1.1 for e in errors.values()))
        _sizes(axes[0], rows, packed=packed)
        source = document["source"]
        title = f"{source.get('name') or document.get('path')}: {console.size(source['bytes'])}"
        if packed:
            title += f" to {console.size(document['bytes'])}, {console.ratio(source['bytes'], document['bytes'])}"
        if document.get("bytes_per_param"):
            title += f", {document['bytes_per_param']:.2f} bytes per parameter"
        _heading(figure, title)
        for panel, (name, points) in zip(axes[1:], errors.items(), strict=True):
            _strip(panel, points, name)
    return figure


def difference(document: Document) -> Figure:
    """The errors of every tensor by role."""
    from matplotlib import rc_context

    errors = _errors(document["tensors"]) or {_RELATIVE: {}}
    with rc_context(STYLE):
        figure, axes = _canvas(*(max(1.8, 0.5 * len(points) + 1.1) for points in errors.values()))
        heading = f"{len(document['tensors']):,} tensors compared"
        errors_in_steps = [f"{what} {value}" for what, value, _ in console.step_errors(document.get("total"))]
        _heading(figure, "; step error: ".join(filter(None, [heading, ", ".join(errors_in_steps)])))
        for panel, (name, points) in zip(axes, errors.items(), strict=True):
            _strip(panel, points, name)
    return figure


def losses(curves: Mapping[str, Sequence[tuple[int, float]]], heading: str) -> Figure:
    """Loss against step, one line per run (`demo`): name -> [(step, loss), ...]."""
    from matplotlib import rc_context

    colours = ("#7b8794", "#0072b2", "#d55e00", "#009e73")
    with rc_context(STYLE):
        figure, axes = _canvas(3.2)
        for i, ((name, points), colour) in enumerate(zip(curves.items(), colours, strict=False)):
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axes[0].plot(steps, values, color=colour, linewidth=1.4 if i else 4.5, alpha=1.0 if i else 0.45, label=name)
        axes[0].set_title("Training loss")
        axes[0].set_xlabel("step")
        axes[0].grid(axis="y")
        axes[0].legend(frameon=False)
        _heading(figure, heading)
    return figure


def _canvas(*heights: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels above each other, of these heights in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(8.0, sum(heights) + 0.55), facecolor=PAPER, layout=layout)
    return figure, list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def _heading(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK)


def _size_rows(tensors: Sequence[Document], *, packed: bool) -> list[tuple[str, str, int, int]]:
    """(role, codec or dtype, bytes before, bytes after), the largest first."""
    sums: dict[tuple[str, str], list[int]] = {}
    for tensor in tensors:
        key = tensor["role"], (tensor.get("codec") if packed else None) or tensor["dtype"]
        total = sums.setdefault(key, [0, 0])
        total[0] += tensor["bytes_before"]
        total[1] += tensor["bytes_after"]
    rows = [(role, codec, before, after) for (role, codec), (before, after) in sums.items()]
    return sorted(rows, key=lambda row: -row[2])


def _sizes(axes: Axes, rows: Sequence[tuple[str, str, int, int]], *, packed: bool) -> None:
    from matplotlib.ticker import FuncFormatter

    positions = range(len(rows))
    if packed:
        axes.barh(positions, [row[2] for row in rows], height=0.62, color=BEFORE, label="before")
    values = [row[3] if packed else row[2] for row in rows]
    colours = [ROLES.get(row[0], ROLES["other"]) for row in rows]
    axes.barh(positions, values, height=0.34 if packed else 0.62, color=colours)
    longest = max((row[2] for row in rows), default=1) or 1
    for y, (_, _, before, after) in enumerate(rows):
        text = console.size(before) if not packed else f"{console.size(after)}  {console.ratio(before, after)}"
        axes.text(before + longest * 0.012, y, text, va="center", color=INK, fontsize=8.5)
    axes.set_yticks(positions, [f"{role}\n{_short(codec)}" for role, codec, _, _ in rows])
    axes.tick_params(axis="y", labelsize=8.5)
    axes.set_xlim(0, longest * 1.2)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: console.size(value)))
    axes.set_title("Size by role and codec (grey: before)" if packed else "Size by role and dtype")


def _strip(axes: Axes, groups: Mapping[str, Sequence[float]], title: str) -> None:
    """One row per group, one dot per tensor on a logarithmic axis, spread so that dots do not hide each other."""
    for y, (role, values) in enumerate(groups.items()):
        ordered = sorted(values)
        spread = 0.3 if len(ordered) > 1 else 0.0
        offsets = [y + spread * (((i * 0.618034) % 1.0) - 0.5) for i in range(len(ordered))]
        axes.scatter(ordered, offsets, s=16, color=ROLES.get(role, INK), alpha=0.65, linewidths=0)
        middle = ordered[len(ordered) // 2]
        axes.plot([middle, middle], [y - 0.28, y + 0.28], color=INK, linewidth=1.2)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(max(len(groups), 1) - 0.4, -0.6)
    if groups:
        axes.set_xscale("log")
        if title == _IN_STEPS:
            in_percent(axes)
    else:
        axes.text(0.5, 0.5, "no difference", transform=axes.transAxes, ha="center", va="center", color=QUIET)
        axes.set_xticks([])
    axes.set_title(title + (" (bar: median)" if groups else ""))


def in_percent(axes: Axes) -> None:
    """Write the logarithmic x axis in per cent."""
    from matplotlib.ticker import LogFormatter

    class Percent(LogFormatter):
        def __call__(self, value: float, place: int | None = None) -> str:
            return console.percent(value) if super().__call__(value, place) else ""

    axes.xaxis.set_major_formatter(Percent())
    axes.xaxis.set_minor_formatter(Percent(labelOnlyBase=False))


def _errors(tensors: Sequence[Document]) -> dict[str, dict[str, list[float]]]:
    """The panels that have points: those of the relative errors and of those in optimizer steps."""
    panels = {_RELATIVE: _error_points(tensors, "relative_rms"), _IN_STEPS: _error_points(tensors, "step_error")}
    return {name: points for name, points in panels.items() if points}


def _error_points(tensors: Sequence[Document], figure: str) -> dict[str, list[float]]:
    """role -> errors above zero: exact tensors have no place on a logarithmic axis."""
    points: dict[str, list[float]] = {}
    for tensor in tensors:
        value: Any = (tensor.get("error", tensor) or {}).get(figure)
        if _positive(value):
            points.setdefault(tensor["role"], []).append(value)
    return {role: points[role] for role in ROLES if role in points}


def _positive(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _short(codec: str, limit: int = 38) -> str:
    return codec if len(codec) <= limit else codec[: limit - 3] + "..."
