"""The README's table: what presets are off by, what they save, and how far losses are off after resuming.

python benchmarks/tables.py        renders it
"""

from __future__ import annotations

import statistics
from typing import Any

Result = dict[str, Any]
TASK = "gpt-adamw-0.95"
ROWS = {"resume": "`resume` (the default)", "small": "`small`", "tiny": "`tiny`", "1.0": "100 % of a step (no preset)"}


def table(resume: Result, quality: Result) -> list[str]:
    """The lines of the table."""
    task, after = resume["tasks"][TASK], [str(steps) for steps in resume["after"]]
    orders = list(task["orders"].values())
    lines = [
        "| preset | ratio | update off by, of a step | weights off by | "
        + " | ".join(f"largest loss gap after {steps} steps" for steps in after)
        + " |",
        "| --- " * (4 + len(after)) + "|",
        f"| `lossless` | {quality['presets']['lossless']['ratio']:.2f} | 0 | 0 |" + " 0 |" * len(after),
    ]
    for variant, shown in ROWS.items():
        runs = [order[variant] for order in orders]
        errors = [f"{100 * max(run[of] for run in runs):.0f} %" for of in ("u_rms", "weight_step_error")]
        gaps = [f"{max(abs(run['held_out_minus_exact'][steps]) for run in runs):.1e}" for steps in after]
        lines.append(f"| {' | '.join([shown, format(runs[0]['ratio'], '.2f'), *errors, *gaps])} |")
    spread = [statistics.stdev(order["exact"][steps] for order in orders) for steps in after]
    lines.append(f"| another order of the data, exact | | | | {' | '.join(f'{s:.1e}' for s in spread)} |")
    return [
        *lines, "",
        f"A GPT of {task['params'] / 1e6:.1f} M parameters trained with AdamW in fp32, saved after {resume['before']} "
        f"steps. Loss gap: held-out loss minus that of the run that went on exactly, the largest of {len(orders)} data "
        "orders; the last row is the standard deviation of the exact runs over them. The ratio of `lossless` is from a "
        "longer run of the same model.",
    ]  # fmt: skip
