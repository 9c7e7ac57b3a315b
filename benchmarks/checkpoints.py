"""The checkpoints that frameworks write, compressed with every preset, and resumed from inside of the framework.

    python benchmarks/checkpoints.py [CASE ...]        -> benchmarks/results/checkpoints.json

A case whose framework is not installed keeps what was measured before. DeepSpeed needs a compiler, and on a machine
without a GPU DS_ACCELERATOR=cpu.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import frameworks
import torch
from common import CACHE, RESULTS, keep
from frameworks import AFTER, BEFORE, LR, Run

import statecodec
from statecodec.checkpoint.report import Report
from tests.contracts.layout import contents_of

PRESETS = ("lossless", "resume", "small", "tiny")


@dataclass(frozen=True)
class Case:
    """A framework's way of saving. `run` of one that cannot run here is None: `write` makes files in its structure."""

    needs: tuple[str, ...]
    """Packages."""
    run: Run | None = None
    write: Callable[[Path], Path] | None = None
    rounded: Callable[[Path], None] | None = None
    """Rounds the first moments of a checkpoint to bf16, to see what that would do to the losses."""


def zero(stage: int, bf16: bool) -> Case:
    """DeepSpeed, two ranks."""
    return Case(("deepspeed",), partial(frameworks.deepspeed, stage, bf16), rounded=rounded if bf16 else None)


def quantised(package: str, name: str) -> Case:
    """torch.save with an optimizer that keeps quantised states."""
    return Case((package,), partial(frameworks.plain, partial(frameworks.optimizer_of, package, name)))


def flashoptim(folder: Path) -> Path:
    """FlashOptim quantises on a GPU only: its structure, with random numbers in it."""
    from tests.frameworks.quantised import write_flashoptim

    folder.mkdir(parents=True)
    return write_flashoptim(folder, torch.float16).path


def megatron(kind: str, folder: Path) -> Path:
    """Megatron-LM needs GPUs: its structure, with random numbers."""
    from tests.layouts import megatron_files

    folder.mkdir(parents=True)
    getattr(megatron_files, kind)(folder)
    return folder


def rounded(folder: Path) -> None:
    """The first moments of a DeepSpeed checkpoint through bf16, as a user would do it."""
    for path in folder.rglob("*optim_states.pt"):
        saved = torch.load(path, weights_only=False)  # written a moment ago, by this script
        own = saved["optimizer_state_dict"]
        inner = own.get("base_optimizer_state") or own["optimizer_state_dict"]
        for state in inner["state"].values():
            state["exp_avg"] = state["exp_avg"].bfloat16().float()
        torch.save(saved, path)


QUANTISED = (
    ("bitsandbytes", "AdamW8bit"), ("torchao", "AdamW8bit"), ("torchao", "AdamW4bit"), ("torchao", "AdamWFp8"),
)  # fmt: skip
CASES: dict[str, Case] = {
    "torch.save": Case((), partial(frameworks.plain, frameworks.adamw)),
    "transformers Trainer, GPT-2": Case(("transformers",), partial(frameworks.trainer, "gpt2", LR)),
    "transformers Trainer, GPT-2, lr 1e-3": Case(("transformers",), partial(frameworks.trainer, "gpt2", 1e-3)),
    "transformers Trainer, Llama, bf16": Case(("transformers",), partial(frameworks.trainer, "llama", LR)),
    "Accelerate": Case(("accelerate",), partial(frameworks.accelerate, False)),
    "Accelerate with an average of the weights": Case(("accelerate",), partial(frameworks.accelerate, True)),
    "Lightning": Case(("lightning",), frameworks.lightning),
    "FSDP2 with DCP, 2 ranks": Case((), partial(frameworks.fsdp2, False)),
    "FSDP2 with DCP, flattened, 2 ranks": Case((), partial(frameworks.fsdp2, True)),
    **{f"DeepSpeed ZeRO-{n}, {'bf16' if b else 'fp32'}, 2 ranks": zero(n, b) for b in (True, False) for n in (1, 2, 3)},
    "Megatron, structure": Case((), write=partial(megatron, "legacy")),
    "Megatron with a distributed optimizer, structure": Case((), write=partial(megatron, "distributed_optimizer")),
    **{f"{package} {name}": quantised(package, name) for package, name in QUANTISED},
    "FlashOptim, structure": Case(("bitsandbytes", "torchao"), write=flashoptim),
}


def main() -> None:
    """Measure the cases that can be measured here, and keep what is known of the others."""
    torch.set_num_threads(1)
    try:
        known = json.loads((RESULTS / "checkpoints.json").read_text())["cases"]
    except FileNotFoundError:
        known = {}
    for name in sys.argv[1:] or CASES:
        case, folder = CASES[name], CACHE / "checkpoints"
        if all(map(importlib.util.find_spec, case.needs)):
            shutil.rmtree(folder, ignore_errors=True)
            known[name] = measured(case, folder)
            shutil.rmtree(folder)
            print(name, known[name], flush=True)
        about = {"steps before": BEFORE, "after": AFTER, "cases": {n: known[n] for n in CASES if n in known}}
        keep("checkpoints", about)


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """What a framework wrote, what is seen in it, ratios, and loss gaps after resuming."""
    if case.run:
        saved, _ = case.run(folder / "run", None)
    else:
        assert case.write is not None
        saved = case.write(folder / "run")
    packed = {preset: folder / f"{preset}.sc.safetensors" for preset in PRESETS}
    reports = {preset: statecodec.compress(saved, path, preset=preset) for preset, path in packed.items()}
    back = {preset: folder / preset / saved.name for preset in ("lossless", "resume")}
    for preset, path in back.items():
        path.parent.mkdir()
        statecodec.restore(packed[preset], path)
    result = {"versions": {name: version(name) for name in ("torch", *case.needs)}, "runs": case.run is not None}
    result |= seen(saved, reports["resume"]) | {"ratio": {p: round(r.ratio or 0.0, 3) for p, r in reports.items()}}
    result["same bytes"] = contents_of(back["lossless"]) == contents_of(saved)
    if case.run:
        exact = case.run(folder / "exact", saved)[1]
        ways = {"resume": back["resume"]}
        if case.rounded:
            ways["bf16 moments"] = folder / "rounded" / saved.name
            shutil.copytree(saved, ways["bf16 moments"])
            case.rounded(ways["bf16 moments"])
        result["exact again"] = case.run(folder / "lossless again", back["lossless"])[1] == exact
        result["largest loss gap"] = {
            way: max(abs(a - b) for a, b in zip(exact, case.run(folder / f"{way} again", path)[1], strict=True))
            for way, path in ways.items()
        }
    return result


def seen(saved: Path, report: Report) -> dict[str, Any]:
    """Files, and what of their tensors is known and stored once; a moment in pieces counts once."""
    files = [p.relative_to(saved).as_posix() for p in sorted(saved.rglob("*")) if p.is_file()] or [saved.name]
    moments: dict[str, str | None] = {}
    for t in report.tensors:  # a table that many quantised moments share has no parameter's name
        if (t.role if t.state is None else t.state.role) in ("exp_avg", "exp_avg_sq"):
            key = (t.name.rpartition("@")[0] or t.name) if t.state is None else t.state.name
            moments[key] = t.param or moments.get(key)
    once = [t for t in report.tensors if t.codec.partition("(")[0] in ("same", "ulps")]
    return {
        "files": files, "bytes": report.source["bytes"], "params": report.num_params,
        "layout": report.source["layout"], "framework": report.source.get("framework"),
        "moments": len(moments), "named": sum(param is not None for param in moments.values()),
        "stored once": sum(t.bytes_before for t in once),
    }  # fmt: skip


if __name__ == "__main__":
    main()
