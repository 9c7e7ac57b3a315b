"""Everything that needs a GPU, in one call and less than eight minutes: the tests marked `gpu`, then the benchmarks.

    python benchmarks/gpu.py                    the stages of PLAN, in their order
    python benchmarks/gpu.py tests steps        some stages
    python benchmarks/gpu.py --list             what each runs, and its limit
    python benchmarks/gpu.py --rehearse         no GPU: every stage in Triton's interpreter, on tiny sizes

Needs python 3.10+, a CUDA build of torch with its triton, numpy, numba, pytest, pytest-timeout and hypothesis; not an
installation of this package, which is taken from the checkout. What else is needed or compared with may lie in
.gpu-packages (`make gpu-packages` fills it, for a machine without a network). What is missing is skipped, and said.

A stage that fails or runs over its limit is reported, and the others go on; after --seconds nothing more is started.
Results are in benchmarks/results/*_gpu*.json, written row by row, so that a stage that is stopped keeps what it has.
The exit code is the number of stages that failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ROOT / ".gpu-packages"
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/kernels")
LARGE = (
    "statecodec,statecodec-graph,statecodec-4bit,statecodec-foam,statecodec-slim,statecodec-lion,torch-fused-fp32,"
    "torch-fused-bf16,flashoptim,bitsandbytes-8bit"
)


@dataclass(frozen=True)
class Stage:
    """A script with its arguments, how long it may take, and the arguments of its rehearsal."""

    command: tuple[str, ...]
    seconds: int
    rehearsal: tuple[str, ...] = ()
    results: str | None = None

    def arguments(self, rehearse: Path | None) -> list[str]:
        """What follows `python`; a rehearsal's results go to a folder of their own."""
        if self.results is None:
            return [*self.command, *(self.rehearsal if rehearse else ())]
        output = ["--output", str((rehearse or ROOT / "benchmarks" / "results") / self.results)]
        return [self.command[0], *(("--rehearse", *self.rehearsal) if rehearse else self.command[1:]), *output]


OPTIM = "benchmarks/optim_gpu.py"
STAGES = {
    "tests": Stage(PYTEST, 160),
    "kernels": Stage(("benchmarks/kernels_gpu.py",), 45, ("--steps", "2"), "kernels_gpu.json"),
    "large": Stage(
        (OPTIM, "--sets", "1b", "--steps", "15", "--only", LARGE), 70, ("--steps", "1"), "optim_gpu_1b.json"
    ),
    "steps": Stage(
        (OPTIM, "--sets", "100m,small"), 90, ("--steps", "1", "--only", "statecodec,torch-foreach-fp32"),
        "optim_gpu.json",
    ),
    "train": Stage(("benchmarks/train_gpu.py", "--seconds", "12"), 100, results="train_gpu.json"),
    "tune": Stage(
        (OPTIM, "--tune", "--sets", "100m,small", "--steps", "15"), 240, ("--steps", "1", "--tune"),
        "optim_gpu_tune.json",
    ),
}  # fmt: skip
PLAN = [name for name in STAGES if name != "tune"]


def environment(rehearse: bool) -> dict[str, str]:
    """The checkout on the path, then the packages that came along; the interpreter in a rehearsal, and only there."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "cli"), env.get("PYTHONPATH", ""), str(PACKAGES) if PACKAGES.is_dir() else ""]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return env | {"TRITON_INTERPRET": "1"} if rehearse else env


def run(name: str, limit: float, rehearse: Path | None) -> bool:
    """Run a stage in a process group of its own; whether it succeeded within the limit."""
    stage = STAGES[name]
    command = [sys.executable, *stage.arguments(rehearse)]
    if name == "tests" and not rehearse and importlib.util.find_spec("xdist"):
        # They compile more than they compute.
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    print(f"=== {name}: {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment(rehearse is not None), start_new_session=True)
    try:
        code = process.wait(limit)
        outcome = "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if rehearse and stage.results and not (rehearse / stage.results).exists():
        outcome = "wrote no results"
    elif rehearse and stage.results:
        json.loads((rehearse / stage.results).read_text())
    print(f"=== {name}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)
    return outcome == "ok"


def run_all(names: list[str], seconds: float, rehearse: Path | None) -> int:
    """Run stages until the time is used up; how many failed or were not run."""
    finish, failed = time.monotonic() + seconds * (10 if rehearse else 1), 0
    for name in names:
        # The interpreter on a busy machine is no measure of a card.
        limit = finish - time.monotonic() if rehearse else min(STAGES[name].seconds, finish - time.monotonic())
        if limit < 5:
            print(f"=== {name}: not run, the {seconds:.0f} s are used up", flush=True)
        failed += limit < 5 or not run(name, limit, rehearse)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; by default all but tune")
    parser.add_argument("--seconds", type=float, default=470.0, help="for all stages together")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if options.list:
        for name, stage in STAGES.items():
            print(f"{name:8} {stage.seconds:4} s  python {' '.join(stage.arguments(None))}")
        return
    if not options.rehearse:
        sys.exit(run_all(options.stages or PLAN, options.seconds, None))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run_all(options.stages or list(STAGES), options.seconds, Path(folder)))


if __name__ == "__main__":
    main()
