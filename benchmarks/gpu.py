"""Everything that needs a GPU, in one call: the tests marked `gpu`, then the benchmarks. Under half an hour.

    python benchmarks/gpu.py                    all stages, in the order of STAGES
    python benchmarks/gpu.py tests steps        some of them
    python benchmarks/gpu.py --list             what each runs, and its limit
    python benchmarks/gpu.py --rehearse         no GPU: every stage in Triton's interpreter, on tiny sizes

Needs python 3.10+, a CUDA build of torch with its triton, numpy, numba, pytest, pytest-timeout and hypothesis; not an
installation of this package, which is taken from the checkout. flashoptim, bitsandbytes and torchao are compared with
where they are installed. A stage that fails or runs over its limit is reported, and the others go on. Results are in
benchmarks/results/*_gpu*.json; the exit code is the number of stages that failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
OPTIM, RESULTS = "benchmarks/optim_gpu.py", "benchmarks/results"


@dataclass(frozen=True)
class Stage:
    """One command, how long it may take, and what stands for it without a GPU."""

    command: tuple[str, ...]
    seconds: int
    rehearsal: tuple[str, ...]


STAGES = {
    "tests": Stage((*PYTEST, "-m", "gpu", "tests/kernels"), 540, (*PYTEST, "tests/kernels/test_folding.py")),
    "kernels": Stage(("benchmarks/kernels_gpu.py",), 150, ("benchmarks/kernels_gpu.py", "--tiny", "--steps", "4")),
    "steps": Stage((OPTIM, "--sets", "100m,small"), 420, (OPTIM, "--tiny", "--steps", "2")),
    "large": Stage(
        (OPTIM, "--sets", "1b", "--steps", "15", "--output", f"{RESULTS}/optim_gpu_1b.json"), 420,
        (OPTIM, "--tiny", "--steps", "1", "--only", "statecodec"),
    ),
    "tune": Stage(
        (OPTIM, "--tune", "--sets", "100m,small", "--steps", "15", "--output", f"{RESULTS}/optim_gpu_tune.json"),
        240, (OPTIM, "--tiny", "--steps", "1", "--tune"),
    ),
}  # fmt: skip


def run(name: str, stage: Stage, rehearse: bool) -> bool:
    """Run one stage in a process of its own; whether it succeeded within its limit."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    if rehearse:
        env["TRITON_INTERPRET"] = "1"
    print(f"=== {name}", flush=True)
    started = time.monotonic()
    try:
        command = [sys.executable, *(stage.rehearsal if rehearse else stage.command)]
        code = subprocess.run(command, cwd=ROOT, env=env, timeout=stage.seconds).returncode
        outcome = "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {stage.seconds} s"
    print(f"=== {name}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)
    return outcome == "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; by default all")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if options.list:
        for name, stage in STAGES.items():
            print(f"{name:8} {stage.seconds:4} s  python {' '.join(stage.command)}")
        return
    chosen = options.stages or list(STAGES)
    sys.exit(sum(not run(name, STAGES[name], options.rehearse) for name in chosen))


if __name__ == "__main__":
    main()
