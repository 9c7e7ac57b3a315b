"""The tables of docs/checkpoints.md: what frameworks write, and how far losses are off after resuming from it."""

from __future__ import annotations

from statistics import median
from typing import Any, TypeAlias

Result: TypeAlias = dict[str, Any]
_FILES = 4  # of a checkpoint, in the table


def checkpoints(r: Result) -> list[str]:
    """What frameworks write, what is seen in it, ratios, and losses after resuming."""
    presets = ("lossless", "resume", "small", "tiny")
    lines = [
        "| written by | recognised as | files | MB | moments named | stored once, MB "
        f"| {' | '.join(f'`{p}`' for p in presets)} | resumed from `lossless` | from `resume`: largest loss gap |",
        "| --- " * (8 + len(presets)) + "|",
    ]
    for name, case in r["cases"].items():
        files = [f"`{path.rpartition('/')[2]}`" for path in case["files"]]
        shown = ", ".join(files[:_FILES]) + (f" and {len(files) - _FILES} more" if len(files) > _FILES else "")
        ratios = " | ".join(f"{case['ratio'][preset]:.2f}" for preset in presets)
        assert case["same bytes"], name
        exact, gap = "same bytes", "-"
        if case["runs"]:
            assert case["exact again"], name
            exact, gap = "same bytes, same losses", f"{case['largest loss gap']['resume']:.1e}"
        if "bf16 moments" in case.get("largest loss gap", ()):
            gap += f" (first moments through bf16: {case['largest loss gap']['bf16 moments']:.1e})"
        lines.append(
            f"| {name} | {case['framework'] or case['layout']} | {shown} "
            f"| {case['bytes'] / 1e6:.1f} | {case['named']} of {case['moments']} "
            f"| {case['stored once'] / 1e6:.1f} | {ratios} | {exact} | {gap} |"
        )
    versions = {package: v for case in r["cases"].values() for package, v in case["versions"].items()}
    return [*lines, "", f"With {', '.join(f'{package} {v}' for package, v in versions.items())}."]


def memory_layouts(r: Result) -> list[str]:
    """Peak memory on directories of shards."""
    sizes = " and ".join(f"{nbytes / 1e9:.1f} GB ({name})" for name, nbytes in r["bytes"].items())
    rows = [f"| {what} | {mib:.0f} MiB |" for what, mib in r["peak RSS, MiB"].items()]
    return [f"| {sizes}, two ranks | peak RSS |", "| --- | --- |", *rows]


def averages(r: Result) -> list[str]:
    """Running averages: bits and ratios of three ways to store them, and what the smallest does to their loss."""
    lines = [
        "| decay | after steps | preset | weights, bits | average: exact, grid, distance | ratio of the file "
        "| loss gap of the average |",
        "| --- " * 7 + "|",
    ]
    for row in r["rows"]:
        bits = ", ".join(f"{value:.1f}" for value in row["average"].values())
        ratios = ", ".join(f"{value:.2f}" for value in row["ratio"].values())
        lines.append(
            f"| {row['decay']} | {row['steps']} | `{row['preset']}` | {row['weight']:.1f} | {bits} | {ratios} "
            f"| {row['loss gap']:+.1e} |"
        )
    return lines


def resume_zero(r: Result) -> list[str]:
    """Loss gaps after resuming ZeRO from checkpoints that were changed in some way; over seeds."""
    ways = {
        "again": "unchanged", "ulp": "every master one fp32 number off", "bf16 moments": "first moments through bf16",
        "0.001": "0.1 % of a step", "0.01": "1 %", "0.1": "10 %", "0.3": "30 %",
    }  # fmt: skip
    lines = [f"| resumed from | {' | '.join(r['cases'])} |", "| --- " * (len(r["cases"]) + 1) + "|"]
    for way, shown in ways.items():
        cells = []
        for runs in r["cases"].values():
            gaps = [run["gaps"][way]["largest"] for run in runs]
            held_out = max(abs(run["gaps"][way]["held out"]) for run in runs)
            cells.append(f"{min(gaps):.1e} to {max(gaps):.1e}, held out {held_out:.1e}" if held_out else "0")
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    orders = [max(abs(gap) for run in runs for gap in run["orders"]) for runs in r["cases"].values()]
    return [*lines, f"| in another data order | {' | '.join(f'held out {gap:.1e}' for gap in orders)} |"]


def loss_gaps(r: Result) -> list[str]:
    """Loss gaps by tokens in a batch and by what changed; over grids."""
    by_tokens = r["largest gap by tokens"]
    parts = list(next(iter(by_tokens.values())))
    lines = [f"| tokens a step | {' | '.join(parts)} |", "| --- " * (len(parts) + 1) + "|"]
    for tokens, gaps in by_tokens.items():
        cells = [f"{median(gaps[part]) * 1e6:.0f} ({max(gaps[part]) * 1e6:.0f})" for part in parts]
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    return lines


def curve(r: Result) -> list[str]:
    """Sizes that `analyze --curve` says, beside those of files; errors of weights at the finest step error."""
    cases = r["cases"]
    fractions = list(next(iter(cases.values()))["fractions"])
    shown = " | ".join(f"{float(f) * 100:g} %" for f in fractions)
    finest = f"weights at {float(fractions[0]) * 100:g} %"
    lines = [
        f"| checkpoint | {shown} | {finest}, of a step: curve, file | CPU s of the curve |",
        "| --- " * (3 + len(fractions)) + "|",
    ]
    for name, case in cases.items():
        points = case["fractions"]
        sizes = " | ".join(f"{p['made'] / 1e6:.2f} ({p['estimated'] / p['made'] - 1:+.1%})" for p in points.values())
        errors = [points[fractions[0]][f"{kind}_weight_error"] or 0.0 for kind in ("estimated", "made")]
        weights = ", ".join(f"{100 * error:.3f} %" for error in errors) if any(errors) else "exact"
        lines.append(f"| {name} | {sizes} | {weights} | {case['seconds']:.1f} |")
    return [*lines, "", "MB of all tensors in the file, and by how much the curve is off."]
