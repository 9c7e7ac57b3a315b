"""Draws benchmarks/results/*.json as the figures of the documents, docs/figures/*.svg.

python benchmarks/figures.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib import rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from statecodec.choose import PRESETS
from statecodec_cli.plots import BEFORE, INK, PAPER, QUIET, STYLE

ROOT = Path(__file__).resolve().parent
FIGURES = ROOT.parent / "docs" / "figures"

Point: TypeAlias = tuple[float, float, float]


def main() -> None:
    """Draw every figure."""
    FIGURES.mkdir(exist_ok=True)
    with rc_context(STYLE):
        figure = presets(json.loads((ROOT / "results" / "quality.json").read_text()))
        figure.savefig(FIGURES / "presets.svg", facecolor=PAPER, metadata={"Date": None})
        figure = resumed(json.loads((ROOT / "results" / "resume.json").read_text()))
        figure.savefig(FIGURES / "resume.svg", facecolor=PAPER, metadata={"Date": None})


def presets(result: dict[str, Any]) -> Figure:
    """Bytes per parameter of one checkpoint: as it is, under ZipNN, and under every preset, with the update's error."""
    found = result["presets"]
    whole = result["checkpoint"]["bytes"] / result["checkpoint"]["params"]
    bars = [("fp32 AdamW checkpoint", whole, "", BEFORE)]
    bars.append(("ZipNN", whole / result["zipnn_fp32_checkpoint"], "lossless", BEFORE))
    for name, preset in found.items():
        bars.append((name, preset["bytes_per_param"], _error(name, preset), "#0072b2"))
    figure = Figure(figsize=(8.0, 0.36 * len(bars) + 0.9), layout="constrained")
    axes = figure.subplots()
    for y, (_, size, error, colour) in enumerate(bars):
        axes.barh(y, size, height=0.62, color=colour)
        ratio = f"{size:.2f} B, {whole / size:.2f}x" if y else f"{size:.2f} B"
        axes.text(size + 0.012 * whole, y, ratio, va="center", color=INK, fontsize=9)
        axes.text(whole * 1.34, y, error, va="center", ha="right", color=QUIET, fontsize=8.5)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.set_xlim(0, whole * 1.35)
    axes.set_xticks([])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_title("Bytes per parameter on disk, and what that does to the next Adam update")
    return figure


def resumed(result: dict[str, Any]) -> Figure:
    """Error against size, and as colour the loss gap after resuming: the largest of all data orders."""
    last = str(result["after"][-1])
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    style: dict[str, Any] = {
        "cmap": "viridis_r",
        "norm": LogNorm(1e-6, 1e-2),
        "edgecolors": INK,
        "linewidths": 0.5,
        "zorder": 2,
    }
    starts: dict[str, float] = {}
    for task in result["tasks"].values():
        alike, presets = _points(task, last)
        if not alike:
            continue
        axes.plot(*zip(*((100 * error, size) for error, size, _ in alike), strict=True), color=BEFORE, zorder=1)
        for found, marker in ((alike, "o"), (presets, "s")):
            errors, sizes, gaps = zip(*found, strict=True) if found else ((), (), ())
            points = axes.scatter([100 * error for error in errors], sizes, c=gaps, s=60, marker=marker, **style)
        starts[task["about"]] = alike[0][1]
    lowest = 0.0
    for about, size in sorted(starts.items(), key=lambda start: start[1]):
        lowest = max(size - 0.1, lowest + 0.14)  # one label above the other
        axes.annotate(about, (0.26, lowest), ha="right", va="center", fontsize=8.5, color=INK)
    figure.colorbar(points, label=f"held-out loss gap after {last} steps")
    axes.set_xscale("log")
    axes.set_xlim(0.02, 150)
    axes.set_xticks([0.3, 1, 3, 10, 30, 100], ["0.3 %", "1 %", "3 %", "10 %", "30 %", "100 %"])
    axes.minorticks_off()
    axes.set_xlabel(
        "error of updates, in optimizer steps; that of weights is the same, at squares (presets) two to four times it"
    )
    axes.set_ylabel("bytes per parameter")
    axes.set_title("Size, error, and what is left of the error in the loss after training on")
    return figure


def _points(task: dict[str, Any], last: str) -> tuple[list[Point], list[Point]]:
    """Error of the update, bytes a parameter and loss gap: where weights are off by as much, and of the presets."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for order in task["orders"].values():
        for variant in order.keys() - {"exact"}:
            runs.setdefault(variant, []).append(order[variant])
    alike, presets = list[Point](), list[Point]()
    for variant, found in runs.items():
        if "bytes_per_param" in found[0]:  # what was compressed
            size, gap = found[0]["bytes_per_param"], max(abs(run["held_out_minus_exact"][last]) for run in found)
            if variant in PRESETS:
                presets.append((PRESETS[variant].budget.moments or 0.0, size, gap))
            else:
                alike.append((float(variant), size, gap))
    return sorted(alike), sorted(presets)


def _error(name: str, preset: dict[str, Any]) -> str:
    if name == "weights":
        return "moments dropped"
    return f"update error {100 * preset['u_rms']:.2g} %" if preset["u_rms"] else "lossless"


if __name__ == "__main__":
    main()
