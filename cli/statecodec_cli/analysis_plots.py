"""What `analyze` draws: a heat map of SNRs per layer and dimension, what cutoffs save, size against step error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from statecodec_cli.plots import GRID, INK, PAPER, QUIET, STYLE, in_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
_ROW = 0.2  # inches per tensor
_MAX_ROWS = 150
_LOW, _HIGH = 0.1, 10.0  # the colour scale is logarithmic and centred on the cutoff


def analysis(document: Document) -> Figure:
    """All panels that the document has something for."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = [t for t in document["tensors"] if t["kind"] not in ("vector", "norm")][:_MAX_ROWS]
    heights = [max(1.2, _ROW * len(rows) + 0.9), 2.4] if rows else []
    heights += [3.6] if document["curve"] else []
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.12)
        figure = Figure(figsize=(8.0, sum(heights) + 0.6 or 1.0), facecolor=PAPER, layout=layout)
        panels = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]) if heights else []
        if rows:
            _heat(figure, panels.pop(0), rows, float(document["cutoff"]))
            _saved(panels.pop(0), document)
        if document["curve"]:
            _curve(panels.pop(0), document["curve"])
        sources = document["sources"]
        name = sources[0].rsplit("/", 1)[-1] if len(sources) == 1 else f"{len(sources)} checkpoints"
        heading = f"{name}: how much each tensor can be compressed"
        figure.suptitle(heading, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def _heat(figure: Figure, axes: Axes, rows: Sequence[Document], cutoff: float) -> None:
    """One row per tensor, one column per subset of dimensions; a frame around what would be shared."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    dims = sorted({d for t in rows for d in t["snr"]}, key=lambda d: (d.count(","), d))[:7]
    scale = cutoff if cutoff > 0 else 1.0
    values = [[_number(t["snr"].get(d)) for d in dims] for t in rows]
    shown = [[min(max(v, _LOW * scale), _HIGH * scale) if not math.isnan(v) else v for v in row] for row in values]
    image = axes.imshow(shown, cmap="BrBG", norm=LogNorm(_LOW * scale, _HIGH * scale), aspect="auto")
    for y, (tensor, row) in enumerate(zip(rows, values, strict=True)):
        for x, value in enumerate(row):
            if not math.isnan(value):
                dark = value > 5 * scale or value < scale / 5
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=6.5, color=PAPER if dark else INK)
        key = ",".join(map(str, tensor["dims"]))
        if key in dims:
            axes.add_patch(Rectangle((dims.index(key) - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.3))
    axes.set_xticks(range(len(dims)), [f"over {d}" for d in dims])
    axes.set_yticks(range(len(rows)), [t["name"].removesuffix(".weight") for t in rows])
    axes.tick_params(axis="y", labelsize=7)
    axes.tick_params(axis="x", labelbottom=True, labelsize=8)
    axes.grid(visible=False)
    axes.set_title(f"SNR of the second moments (framed: shared, above {cutoff:g})")
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.outline.set_visible(False)


def _saved(axes: Axes, document: Document) -> None:
    points = [(c, 100 * s) for c, s in document["saved_curve"] if c > 0]
    axes.step([p[0] for p in points], [p[1] for p in points], where="post", color="#009e73", linewidth=1.6)
    axes.axvline(float(document["cutoff"]), color=QUIET, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(0, 103)
    axes.set_xlabel("SNR cutoff")
    axes.set_ylabel("% of second moments")
    axes.grid(axis="both", color=GRID)
    share = 100 * float(document["saved"]["layer"])
    axes.set_title(f"Second moments saved, rules by layer ({share:.1f} % at {document['cutoff']:g})")


def _curve(axes: Axes, curve: Sequence[Document]) -> None:
    """Estimated size against step error, and the presets, whose weights may be off by more, as labelled points."""
    line = [p for p in curve if p["label"] is None]
    axes.plot([p["step_error"] for p in line], [p["bytes_per_param"] for p in line], color=INK)
    for point in (p for p in curve if p["label"] is not None):
        position = (point["step_error"], point["bytes_per_param"])
        axes.scatter([position[0]], [position[1]], s=32, color="#0072b2", zorder=3)
        axes.annotate(point["label"], position, xytext=(6, 5), textcoords="offset points", fontsize=8.5, color=INK)
    axes.set_xscale("log")
    in_percent(axes)
    axes.set_xlabel("error of the update, of one optimizer step")
    axes.set_ylabel("bytes per parameter")
    axes.set_ylim(bottom=0)
    axes.grid(axis="both", color=GRID)
    axes.set_title("Size against step error, asked of weights too (points: presets)")


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
