"""What grows with the number of tensors: finding them, choosing, the manifest, opening, memory.

Each is measured in a process of its own. Together with the rates of speed.py this is what docs/scaling.md computes
from.

python benchmarks/scaling.py [--items 10000 100000 1000000]        -> benchmarks/results/scaling.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import CACHE, keep

_NUMEL = 16  # of a tensor: what is measured does not depend on it, and 10**6 tensors stay small
# VmHWM and not ru_maxrss, which a child inherits from the process that forked it.
_PROGRAM = r"""
import json, re, sys, time
import statecodec
from statecodec.verbs.shares import deal
verb, source, target = sys.argv[1:]
statecodec.open(source).close()  # imports are not what is measured
before, started = time.process_time(), time.perf_counter()
found = {}
if verb == "open":
    with statecodec.open(source) as checkpoint:
        found["items"] = len(checkpoint.items)
elif verb == "deal":
    with statecodec.open(source) as checkpoint:
        found["shares"] = len(deal(checkpoint, 64))
elif verb == "compress":
    report = statecodec.compress(source, target, force=True, sha256=False)
    found["bytes"] = report.bytes
elif verb == "restore":
    statecodec.restore(source, target, force=True)
found |= {"cpu": time.process_time() - before, "wall": time.perf_counter() - started}
found["peak"] = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps(found))
"""


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    measured: dict[str, Any] = {}
    for items in arguments.items:
        source, packed, back = made(items), CACHE / "scaling.sc.safetensors", CACHE / "scaling.back.pt"
        stages = {
            "open the original": ("open", source, packed),
            "divide into 64 shares": ("deal", source, packed),
            "compress": ("compress", source, packed),
            "open the compressed file": ("open", packed, packed),
            "restore": ("restore", packed, back),
        }
        found = {}
        for name, stage in stages.items():
            found[name] = one = run(*stage)
            print(f"{items:>9,} {name}: {one['cpu']:.1f} CPU s, {one['peak'] / 2**20:.0f} MiB", flush=True)
        measured[str(items)] = {
            "bytes": source.stat().st_size,
            "compressed": packed.stat().st_size,
            "tensor_bytes": items * _NUMEL * 4,
            "stages": found,
        }
        keep("scaling", {"items": measured})
        for path in (source, packed, back):
            path.unlink()


def made(items: int) -> Path:
    """A checkpoint of so many small tensors: an AdamW state over many experts."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"many-{items}.pt"
    started = time.perf_counter()
    params = items // 3
    tensors = list(torch.randn(items, _NUMEL).abs_())
    model = {f"layers.{i // 64}.experts.{i % 64}.weight": tensors[3 * i].clone() for i in range(params)}
    state = {
        i: {"exp_avg": tensors[3 * i + 1].clone(), "exp_avg_sq": tensors[3 * i + 2].clone()} for i in range(params)
    }
    group = {"params": list(range(params)), "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    torch.save({"model": model, "optimizer": {"state": state, "param_groups": [group]}}, path)
    print(f"{items:>9,} tensors saved in {time.perf_counter() - started:.0f} s", flush=True)
    return path


def run(verb: str, source: Path, target: Path) -> dict[str, Any]:
    """One step in a fresh process."""
    command = [sys.executable, "-c", _PROGRAM, verb, str(source), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main()
