"""Renders benchmarks/results/*.json as the tables of the documents.

python benchmarks/tables.py            rewrites them in place
python benchmarks/tables.py --check    exits with 1 if they are not what the results say
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aims
import checkpoint_tables
import readme_table
import scale_model

from statecodec.choose import PRESETS

ROOT = Path(__file__).resolve().parent
DOCUMENTS = [ROOT.parent / "README.md", *sorted((ROOT.parent / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Result = dict[str, Any]


def main() -> int:
    """Rewrite or check; the number of documents that are out of date."""
    stale = 0
    for path in DOCUMENTS:
        text = path.read_text()
        made = MARKED.sub(lambda m: f"{m[1]}{table(m[2])}{m[3]}", text)
        if made != text:
            stale += 1
            print(f"{path.name} is out of date", file=sys.stderr)
            if "--check" not in sys.argv:
                path.write_text(made)
    return stale if "--check" in sys.argv else 0


def table(name: str) -> str:
    """One table as Markdown, with the machine it was measured on."""
    if name in COMPUTED:
        sources, compute = COMPUTED[name]
        lines = compute(*map(_result, sources))
        script = (compute.func if isinstance(compute, partial) else compute).__module__
        return "\n".join(lines) + f"\n\nComputed by `benchmarks/{script}.py` from {' and '.join(sources)}.\n"
    result = _result(name)
    machine = result["machine"]
    where = f"\n{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}, {machine['date']}."
    return "\n".join(TABLES[name](result)) + f"\n{where} `python benchmarks/{name}.py`\n"


def _result(name: str) -> Result:
    return dict(json.loads((ROOT / "results" / f"{name}.json").read_text()))


def quality(r: Result) -> list[str]:
    """Size and error of each preset."""
    lines = [
        "| preset | ratio | B/param | weights, of a step | update, of a step | max \\|u\\| / exact | cosine |",
        "| --- " * 7 + "|",
    ]
    for name, p in r["presets"].items():
        moments = "-" if name == "weights" else f"{p['u_rms']:.2g}"
        largest = "-" if name == "weights" else f"{p['max_u'] / p['max_u_exact']:.2f}"
        cosine = "-" if name == "weights" else f"{p['cosine']:.6f}"
        lines.append(
            f"| `{name}` | {p['ratio']:.2f} | {p['bytes_per_param']:.2f} | {p['weight_step_error']:.2g} | {moments} "
            f"| {largest} | {cosine} |"
        )
    bf16 = r["bf16_weights"]
    return [
        *lines, "",
        f"ZipNN 0.5.4 on the same fp32 checkpoint ({r['checkpoint']['params'] / 1e6:.1f} M parameters): "
        f"{r['zipnn_fp32_checkpoint']:.2f}. A bf16 `model.safetensors`: `lossless` {bf16['lossless']:.3f}, "
        f"ZipNN {bf16['zipnn']:.3f}.",
    ]  # fmt: skip


def speed(r: Result) -> list[str]:
    """Rates of all contenders, on the large file and on the small one."""
    lines = [*_rates(r), "", *_rates(r["small"])]
    return [
        *lines, "",
        "`copy` reads and writes every byte; only a tool that writes or reads fewer of them can pass it.", "",
        "| `resume` with two threads: share of the wall time of one | compress | restore |", "| --- " * 3 + "|",
        *(_two_threads(of) for of in (r["small"], r, r["larger"])),
    ]  # fmt: skip


def _two_threads(r: Result) -> str:
    contenders = r["contenders"]
    (two,) = (name for name in contenders if name.endswith(", two threads"))
    one = contenders[two.removesuffix(", two threads")]
    shares = (one[f"{verb}_wall"] / contenders[two][f"{verb}_wall"] for verb in ("compress", "restore"))
    return "| " + " | ".join((f"{r['bytes'] / 1e9:.2f} GB", *(f"{share:.2f}" for share in shares))) + " |"


def _rates(r: Result) -> list[str]:
    lines = [
        f"| {r['bytes'] / 1e9:.2f} GB, file to file with fsync | ratio | compress, GB/CPU s | against ZipNN "
        "| restore, GB/CPU s | against ZipNN |",
        "| --- " * 6 + "|",
    ]
    for name, c in r["contenders"].items():
        against = r["against_zipnn"][name]
        lines.append(
            f"| {name} | {c['ratio']:.2f} | {c['compress_cpu']:.2f} | {against['compress']:.1f}x "
            f"| {c['restore_cpu']:.2f} | {against['restore']:.1f}x |"
        )
    return lines


def codec_speed(r: Result) -> list[str]:
    """Rates without any file."""
    lines = [
        f"| {r['bytes'] / 1e9:.2f} GB, memory to memory | ratio | compress, GB/CPU s | against ZipNN "
        "| restore, GB/CPU s | against ZipNN |",
        "| --- " * 6 + "|",
    ]
    for name, c in r["contenders"].items():
        lines.append(
            f"| {name} | {c['ratio']:.2f} | {c['compress']:.2f} | {c['compress_against_zipnn']:.1f}x "
            f"| {c['restore']:.2f} | {c['restore_against_zipnn']:.1f}x |"
        )
    return lines


def memory(r: Result) -> list[str]:
    """Peak RSS."""
    lines = [
        f"| {r['bytes'] / 1e9:.1f} GB checkpoint, tensors of up to {r['largest_tensor'] >> 20} MiB | peak RSS |",
        "| --- | --- |",
    ]
    lines += [f"| {name} | {peak:.0f} MiB |" for name, peak in r["peak RSS, MiB"].items()]
    return [*lines, f"| `import torch` alone | {r['import torch alone, MiB']:.0f} MiB |"]


def resume(r: Result) -> list[str]:
    """What resuming from every preset and step error did to the losses, and to the path of the weights."""
    first, last = r["after"]
    lines = [
        f"| trained | errors of a step | ratio | B/param | training loss, largest gap in {first} steps "
        f"| held-out loss minus exact after {first} | after {last} | path deviation |",
        "| --- " * 8 + "|",
    ]
    for task in r["tasks"].values():
        orders = list(task["orders"].values())
        for variant in sorted({v for o in orders for v in o if v != "exact"}, key=_fraction):
            own = [order[variant] for order in orders if variant in order]
            gaps = [", ".join(f"{f['held_out_minus_exact'][str(n)]:+.1e}" for f in own) for n in (first, last)]
            sizes = f"{own[0]['ratio']:.2f} | {own[0]['bytes_per_param']:.2f}" if "ratio" in own[0] else "- | -"
            shown = _shown(variant)
            largest, path = max(f["largest_loss_gap"] for f in own), statistics.mean(f["path_deviation"] for f in own)
            lines.append(
                f"| {task['about']} | {shown} | {sizes} | {largest:.1e} | {gaps[0]} | {gaps[1]} | {path:.1e} |"
            )
    spread = [
        f"{task['about']} ({task['params'] / 1e6:.1f} M parameters) {statistics.stdev(exact):.1e}"
        for task in r["tasks"].values()
        if len(exact := [order["exact"][str(last)] for order in task["orders"].values()]) > 1
    ]
    return [
        *lines, "",
        f"Saved after {r['before']} steps; one figure for each data order. Standard deviation of exact resumes over "
        f"data orders after {last} steps: {'; '.join(spread)}.",
    ]  # fmt: skip


def _fraction(variant: str) -> tuple[bool, float]:
    """Presets last; by the error of the update, which one ulp has none of."""
    if variant in PRESETS:
        return True, PRESETS[variant].budget.moments or 0.0
    return False, float(variant) if variant[0].isdigit() else 0.0


def _shown(variant: str) -> str:
    """A step error in percent, a preset with its two, or what else was done."""
    if variant in PRESETS:
        errors = PRESETS[variant].budget.figures.values()
        return f"`{variant}`: {', '.join(f'{100 * error:g} %' for error in errors)}"
    return f"{float(variant) * 100:g} %" if variant[0].isdigit() else variant


def chain(r: Result) -> list[str]:
    """Links by distance, and whole chains."""
    fractions = list(dict.fromkeys(link["fraction"] for link in r["links"]))
    shown = " | ".join(f"{f * 100:g} %" for f in fractions)
    lines = [f"| step | steps since the base | {shown} |", "| --- " * (2 + len(fractions)) + "|"]
    found = {(m["step"], m["distance"], m["fraction"]): m for m in r["links"]}
    for step, distance in dict.fromkeys((m["step"], m["distance"]) for m in r["links"]):
        own = [found[step, distance, f] for f in fractions]
        sizes = " | ".join(f"{m['ratio']:.1f}x ({m['alone'] / m['link']:.2f})" for m in own)
        lines.append(f"| {step} | {distance} | {sizes} |")
    sums = " | ".join(f"{c['source'] / c['chain']:.1f}x ({c['alone'] / c['chain']:.2f})" for c in r["chains"])
    lines.append(f"| 50 to 400 | a chain, 50 apart | {sums} |")
    for step in dict.fromkeys(g["step"] for g in r["gaps"]):
        gaps = [max(map(abs, g["held_out_minus_exact"])) for g in r["gaps"] if g["step"] == step]
        lines.append(f"| {step} | largest loss gap | {' | '.join(f'{gap:.1e}' for gap in gaps)} |")
    return [
        *lines, "",
        f"A GPT of {r['params'] / 1e6:.1f} M parameters. In brackets: how many times smaller than without a base. "
        f"Loss gap: held out, {r['resumed_steps']} steps after resuming, against the exact resume, the larger of two "
        "data orders.",
    ]  # fmt: skip


def predicted(r: Result) -> list[str]:
    """Sizes and times with and without predictions."""
    cases = r["cases"]
    fractions = next(iter(cases.values()))["fractions"]
    lines = [
        f"| checkpoint | MB | {' | '.join(f'{float(f) * 100:g} %' for f in fractions)} | compress | restore |",
        "| --- " * (4 + len(fractions)) + "|",
    ]
    for name, case in cases.items():
        ratios = [f"{f['zstd']['ratio']:.2f}, **{f['predicted']['ratio']:.2f}**" for f in case["fractions"].values()]
        times = zip(case["seconds"]["predicted"], case["seconds"]["zstd"], strict=True)
        shown = [f"{a / b:.2f}" for a, b in times]
        lines.append(f"| {name} | {case['bytes'] / 1e6:.1f} | {' | '.join([*ratios, *shown])} |")
    return lines


def distributed_table(r: Result) -> list[str]:
    """Size and cost of a sharded save, and who goes on from it."""
    lines = ["| two ranks save | B/param | CPU s | even rows, loaded by 1, 2, 3 | uneven rows |", "| --- " * 5 + "|"]
    errors = set[str]()
    for name, c in r["contenders"].items():
        shown = [f"{c['bytes'] / r['params']:.2f}", f"{c['save_cpu_seconds']:.3f}"]
        for found in (c["even"].values(), c["uneven"].values()):
            shown.append(", ".join("error" if isinstance(f, str) else f"{f:.2g}" if f else "=" for f in found))
            errors |= {f"`{f}`" for f in found if isinstance(f, str)}
        lines.append(f"| {name} | {' | '.join(shown)} |")
    about = "`=` the weights are bit for bit those of a run without a break, three steps on; a number is the largest"
    return [*lines, "", f"{about} difference, in learning rates. Errors: {'; '.join(sorted(errors))}."]


def startup(r: Result) -> list[str]:
    """Import and help times."""
    rows = [f"| {name.removesuffix(', s')} | {value:.2f} s |" for name, value in r.items() if name != "machine"]
    return ["| | median of 9 |", "| --- | --- |", *rows]


def convergence(r: Result) -> list[str]:
    """Every optimizer at the best of its learning rates, over seeds, paired with torch's AdamW at its own best."""
    losses: dict[str, dict[float, dict[int, float]]] = {}
    for run in r["runs"]:
        losses.setdefault(run["name"], {}).setdefault(run["lr"], {})[run["seed"]] = run["val_loss"]
    best = {name: min(by_lr, key=lambda lr: by_lr[lr].get(0, math.inf)) for name, by_lr in losses.items()}
    exact = losses["torch AdamW"]
    lines = [
        "| optimizer | lr | validation loss | paired to AdamW | at lr 1e-3 | state B/param | step, ms |",
        "| --- " * 7 + "|",
    ]
    for name, by_lr in losses.items():
        own, theirs = by_lr[best[name]], exact[best["torch AdamW"]]
        paired = statistics.mean(own[s] - theirs[s] for s in own if s in theirs)
        equal = by_lr[1e-3][0] - exact[1e-3][0]
        spread = f" +- {statistics.stdev(own.values()):.4f}" if len(own) > 1 else ""
        first = next(run for run in r["runs"] if run["name"] == name)
        lines.append(
            f"| {name} | {best[name]:g} | {statistics.mean(own.values()):.4f}{spread} (n = {len(own)}) | {paired:+.4f} "
            f"| {equal:+.4f} | {first['state_bytes_per_param']:.2f} | {first['step_ms']:.1f} |"
        )
    return lines


def optim_memory(r: Result) -> list[str]:
    """Bytes of live tensors at the peak of a training step, and between steps."""
    lines = ["| optimizer | peak, B/param | between steps |", "| --- | --- | --- |"]
    rows = r["bytes_per_param"].items()
    return lines + [f"| {name} | {row['peak']:.2f} | {row['at_rest']:.2f} |" for name, row in rows]


def step_budget(r: Result) -> list[str]:
    """Bits of each part at each fraction of a step."""
    lines = [
        "| state | fraction of a step | exp_avg | exp_avg_sq | weights | B/param | u-rms | encode, decode, ns/param |",
        "| --- " * 8 + "|",
    ]
    for state in ("gpt", "conv"):
        for name, f in r[state]["fractions"].items():
            shown = f"{float(name) * 100:g} %" if name[0].isdigit() else f"`{name}`"
            bits = " | ".join(f"{f[part]['bits']:.2f}" for part in ("exp_avg", "exp_avg_sq", "weight"))
            # Of companded moments the figure is the error of exp_avg alone.
            error = f"{f['exp_avg']['relative_rms']:.2g}" if name[0].isdigit() else "-"
            rates = f"{f['encode_ns']:.1f}, {f['decode_ns']:.1f}"
            lines.append(f"| {state} | {shown} | {bits} | {f['bytes_per_param']:.2f} | {error} | {rates} |")
    return lines


COMPUTED: dict[str, tuple[tuple[str, ...], Callable[..., list[str]]]] = {
    "aims": (("resume", "loss_gaps", "quality", "predicted", "speed", "memory"), aims.table),
    "presets": (("resume", "quality"), readme_table.table),
    "scaling_save": (("quality", "speed"), partial(scale_model.save_table, "resume")),
    "scaling_offline": (("quality", "speed"), partial(scale_model.offline_table, "resume")),
}
TABLES: dict[str, Callable[[Result], list[str]]] = {
    "quality": quality, "speed": speed, "codec_speed": codec_speed,
    "memory": memory, "resume": resume, "chain": chain,
    "memory_layouts": checkpoint_tables.memory_layouts, "averages": checkpoint_tables.averages,
    "resume_zero": checkpoint_tables.resume_zero, "loss_gaps": checkpoint_tables.loss_gaps,
    "checkpoints": checkpoint_tables.checkpoints, "curve": checkpoint_tables.curve, "predicted": predicted,
    "distributed_table": distributed_table, "startup": startup,
    "convergence": convergence, "optim_memory": optim_memory, "step_budget": step_budget,
    "scaling": scale_model.planning_table,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
