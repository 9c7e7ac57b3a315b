"""What was aimed at beside what the other benchmarks found: rows of a table, from results/*.json alone.

python benchmarks/tables.py        renders it into docs/benchmarks.md
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

Result = dict[str, Any]
Row = tuple[str, str, str, bool]  # what, the aim, what was found, whether it is reached
GPTS = ("gpt-adamw-0.95", "gpt-adamw-0.999")
PRESETS = (("resume", 3.6, 8, 1e-5), ("small", 5.5, 200, 5e-5), ("tiny", 6.8, 200, 1e-4))  # ratio; loss gap after steps


def table(
    resume: Result, loss_gaps: Result, quality: Result, predicted: Result, speed: Result, memory: Result
) -> list[str]:
    """The lines of the table."""
    rows = [*_presets(resume), _gap_of_batches(loss_gaps), *_others(resume, quality, predicted)]
    rows += [*_rates(speed), *_threads(speed), _memory(memory)]
    shown = [f"| {what} | {aim} | {found} | {'yes' if met else '**no**'} |" for what, aim, found, met in rows]
    return ["| | aim | found | reached |", "| --- " * 4 + "|", *shown]


def _presets(resume: Result) -> Iterator[Row]:
    """Of both GPTs with AdamW the worst figure, over all data orders and weights that training began with."""
    tasks = [task for name, task in resume["tasks"].items() if name.startswith(GPTS)]
    for preset, ratio, steps, gap in PRESETS:
        runs = [order[preset] for task in tasks for order in task["orders"].values()]
        least = min(run["ratio"] for run in runs)
        largest = max(abs(run["held_out_minus_exact"][str(steps)]) for run in runs)
        yield f"fp32 GPT with AdamW, `{preset}`: ratio", f"{ratio:g}", f"{least:.2f}", least >= ratio
        about = f"the same: loss gap, held out, {steps} steps after resuming"
        yield about, f"{gap:.0e}", f"{largest:.1e}", largest <= gap
        if preset == "resume":
            largest = max(run["largest_loss_gap"] for run in runs)
            yield (
                "the same: training loss of 8 steps of 128 tokens, largest gap",
                f"{gap:.0e}",
                f"{largest:.1e}",
                (largest <= gap),
            )
    for name in GPTS:
        task = resume["tasks"][name]
        runs, last = list(task["orders"].values()), str(resume["after"][-1])
        least = runs[0]["1.0"]["ratio"]
        spread = statistics.stdev(run["exact"][last] for run in runs)
        gap = max(abs(run["1.0"]["held_out_minus_exact"][last]) for run in runs)
        yield f"{task['about']}, a whole step: ratio", "9.5", f"{least:.2f}", least >= 9.5
        yield (
            f"the same: loss gap after {last} steps",
            f"spread over data orders, {spread:.1e}",
            f"{gap:.1e}",
            (gap <= spread),
        )


def _gap_of_batches(loss_gaps: Result) -> Row:
    """Of one compression after the other, with errors a few per cent apart."""
    tokens, gaps = max(((int(n), of["all"]) for n, of in loss_gaps["largest gap by tokens"].items()))
    about = f"GPT, `resume`: training loss of {loss_gaps['after']} steps of {tokens} tokens, largest gap"
    return about, "1e-05", f"{max(gaps):.1e}", max(gaps) <= 1e-5


def _others(resume: Result, quality: Result, predicted: Result) -> Iterator[Row]:
    conv = resume["tasks"]["conv-sgd"]["orders"]["0"]["0.01"]["ratio"]
    yield "conv net, SGD with momentum, 1 % of a step: ratio", "3", f"{conv:.2f}", conv >= 3
    for name, case in predicted["cases"].items():
        if "bf16" in name:
            ratio = case["fractions"]["0.01"]["predicted"]["ratio"]  # which is the default there
            yield f"{name}, 1 % of a step: ratio", "2.3", f"{ratio:.2f}", ratio >= 2.3
    lossless, bf16 = quality["presets"]["lossless"]["ratio"], quality["bf16_weights"]["lossless"]
    yield "`lossless`, fp32 checkpoint: ratio", "1.23", f"{lossless:.2f}", round(lossless, 2) >= 1.23
    yield "`lossless`, bf16 weights: ratio", "1.505", f"{bf16:.3f}", bf16 >= 1.505


def _rates(speed: Result) -> Iterator[Row]:
    """Aims were set when ZipNN was given 64 MB at a time, at 0.24 GB a CPU second."""
    for of, share in ((speed, 1.0), (speed["small"], 0.8)):
        against = of["against_zipnn"]["statecodec resume"]
        copy = of["against_zipnn"]["copy"]
        for verb, aim in (("compress", 3 * share), ("restore", 5 * share)):
            about = f"{of['bytes'] / 1e9:.2f} GB, `resume`, {verb}: times ZipNN's rate per CPU second"
            found = f"{against[verb]:.1f} (a copy: {copy[verb]:.1f})"
            yield about, f"{aim:g}", found, against[verb] >= aim


def _threads(speed: Result) -> Iterator[Row]:
    for of in (speed, speed["larger"]):
        one, two = (of["contenders"][f"statecodec resume{more}"]["compress_wall"] for more in ("", ", two threads"))
        about = f"{of['bytes'] / 1e9:.2f} GB, `resume`, compress: wall time of two threads, of one"
        yield about, "0.6", f"{one / two:.2f}", round(one / two, 2) <= 0.6


def _memory(memory: Result) -> Row:
    largest = max(memory["peak RSS, MiB"].values())
    about = f"{memory['bytes'] / 1e9:.1f} GB: largest memory of any preset, compress and restore, MiB"
    return about, "450", f"{largest:.0f}", largest <= 450
