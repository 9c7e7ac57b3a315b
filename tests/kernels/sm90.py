"""Compile every Triton kernel without a GPU, from the arguments that the real launches pass, and read the machine code.

A script for a process of its own (TRITON_INTERPRET must be unset when triton is imported): launches are intercepted
and compiled. Nothing runs. Every launch is compiled for sm_90 as it is, and described, as JSON on stdout. Triton
compiles a kernel again for what it knows of an integer argument (is it 1? divisible by 16? beyond 32 bits?), so every
launch is compiled in three more forms, in which each integer is each of that once; the forms go to sm_80, sm_90 and
sm_100 in turn. That is not every form on every architecture: what Triton makes of an integer is decided before it looks
at the architecture, and a kernel has many launches.

    python tests/kernels/sm90.py            everything
    python tests/kernels/sm90.py --keep DIR also leave the PTX and the machine code in DIR
    python tests/kernels/sm90.py --only ends|few|codecs|steps|fast|adam --arch 90
    python tests/kernels/sm90.py --plain    only as the real launches are, for every architecture named
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from statecodec.kernels import triton as backend
from statecodec.kernels.curves import Curve
from statecodec.kernels.fused import Hyper, Slot, StateStorage
from statecodec.kernels.grids import Grid, LogGrid
from statecodec.kernels.triton import companding, folding, grid, launch, runtime
from statecodec.kernels.triton.tables import Spec

sys.path.insert(0, str(Path(__file__).parent))
from sass import loop

# What Triton tells apart: 1, divisible by 16, and what needs 64 bits.
LEVELS = (1, 16, 2**31 + 1)

# Codecs whose encoder goes from tile to tile, and how many elements of one a thread has.
LOOPS = dict.fromkeys(("uniform", "direction", "logarithmic", "compare"), 16)


class Driver:
    """As much of a Triton driver as it takes to compile: there is no device, so nothing can be launched."""

    arch = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def form(function: JITFunction[Any], args: tuple[Any, ...], number: int) -> tuple[Any, ...]:
    """The arguments with other integers: in the forms 0 to 2 each of them is at each level once."""
    integers = [i for i, a in enumerate(args) if type(a) is int and not function.params[i].is_constexpr]
    levels = {i: LEVELS[(at + number) % len(LEVELS)] for at, i in enumerate(integers)}
    return tuple(levels.get(i, a) for i, a in enumerate(args))


def step_name(spec: Spec) -> str:
    """Method, weight and states of a fused step."""
    states = [
        f"companded{state.curve.bits}" if state.curve else "shared" if state.dims else "dense"
        for state in (spec.m, spec.v)
        if state
    ]
    return " ".join([spec.method, f"{spec.weight}+{spec.low}", *states])


def faults(asm: dict[str, Any]) -> list[str]:
    """What is wrong with the arithmetic of a program."""
    # Quotients and roots start from these two approximations and correct them (`words`); there may be no others.
    plain = re.sub(r"\b(?:rcp|rsqrt)\.approx\.ftz\b", "", asm["ptx"])
    found = {
        "subnormals are flushed": ".ftz" in plain,
        "a division or root is approximate": bool(re.search(r"\.(?:approx|full)\.", plain)),
        "operations were contracted": bool(re.search(r"\sfma\.rn\.f32", plain)) and "math.fma" not in asm["ttir"],
    }
    return [fault for fault, there in found.items() if there]


class Recorder:
    """Stands in for JITFunction.run: what Triton would launch is compiled, each specialisation once."""

    def __init__(self, driver: Driver, archs: list[int], keep: Path | None, plain: bool) -> None:
        self.driver, self.archs, self.keep, self.plain = driver, archs, keep, plain
        self.seen, self.rows, self.launches = set[str](), list[dict[str, Any]](), Counter[str]()
        self.compile = JITFunction.run

    def run(self, function: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert not warmup
        assert all(size > 0 for size in grid)
        kind = kwargs["TASK"].kind if "TASK" in kwargs else None
        name = f"{function.__name__} {kind}" if kind else function.__name__
        for arch, some, as_launched in self.variants(function, args):
            self.driver.arch = arch
            compiled = self.compile(function, *some, grid=grid, warmup=True, **kwargs)
            if compiled.hash not in self.seen:
                self.seen.add(compiled.hash)
                row = {"kernel": name, "arch": arch, "as_launched": as_launched, "faults": faults(compiled.asm)}
                if as_launched:
                    elements, spec = LOOPS.get(kind, 0) if "encode" in name else 0, kwargs.get("SPEC")
                    if spec and spec.width:  # a step over tiles
                        row["step"], elements = step_name(spec), spec.count * spec.width * spec.block / 128
                    row |= self.describe(compiled, name, elements)
                    row["faults"] += ["registers are spilled"] if row["spills"] else []
                self.rows.append(row)

    def variants(
        self, function: JITFunction[Any], args: tuple[Any, ...]
    ) -> Iterator[tuple[int, tuple[Any, ...], bool]]:
        """Architecture, arguments, and whether they are those of the launch."""
        for arch in self.archs:
            if self.plain or arch == 90:
                yield arch, args, True
        if not self.plain:
            turn = self.launches[function.__name__]
            self.launches[function.__name__] += 1
            for number in range(len(LEVELS)):
                yield self.archs[(turn + number) % len(self.archs)], form(function, args, number), False

    def describe(self, compiled: Any, name: str, elements: float) -> dict[str, Any]:
        ptx, sass, usage = compiled.asm["ptx"], *self.dump(compiled.asm["cubin"])
        if self.keep:
            self.keep.mkdir(parents=True, exist_ok=True)
            stem = self.keep / f"{len(self.rows):03d}{name.replace(' ', '_')}"
            for suffix, text in ((".ptx", ptx), (".sass", sass), (".ttgir", compiled.asm["ttgir"])):
                stem.with_suffix(suffix).write_text(text)
        return {
            "wide_loads": len(re.findall(r"ld\.global[a-zA-Z0-9_:.]*\.v[24]", ptx)),
            "wide_stores": len(re.findall(r"st\.global[a-zA-Z0-9_:.]*\.v[24]", ptx)),
            "layout_changes": compiled.asm["ttgir"].count("ttg.convert_layout"),
            "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", sass)),
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
            **(self.loop(sass, elements) if elements else {}),
        }

    @staticmethod
    def loop(sass: str, elements: float) -> dict[str, Any]:
        """What the loop costs, per element where it says so; a thread has so many of a tile."""
        found = loop(sass)
        assert found is not None
        return {
            "slots_per_element": len(found.opcodes) / elements,
            "slots_by_pipe": {k: round(n / elements, 1) for k, n in found.pipes.items()},
            "loop_calls": found.count("CALL"),
            "loop_barriers": found.count("BAR"),
            "loop_branches": found.branches,
            "loads_of_16_bytes": sum(op.startswith("LDG.E.128") for op in found.opcodes),
        }

    @staticmethod
    def dump(cubin: bytes) -> tuple[str, str]:
        """(machine code, resource usage) as text."""
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

        def run(*command: str | Path) -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            sass = run(tools / "nvdisasm", "-c", file.name)
            usage = run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        return sass, usage


def curves() -> list[Curve]:
    """Every curve at both widths."""
    signed = {"softsign": True, "linear": True, "sqrt": False, "log": False}
    return [Curve(name, bits, sign, 16 if bits == 8 else 2) for name, sign in signed.items() for bits in (8, 4)]


def stand_alone() -> None:
    """Call every stand-alone kernel on the shapes that lead to different code."""
    for curve in curves():
        companded(curve, 4, 256, 128)
        if curve.name == "log":  # where groups lie does not depend on the curve
            companded(curve, 4, 200, 128)
            companded(curve, 4, 40000, 20000)
    for high in (torch.bfloat16, torch.float16):
        for low in (torch.int8, torch.int16):
            master_weights(high, low)
    for block in (1, 4, 256, 8192):
        block_means(block)
    on_grids()


def companded(curve: Curve, rows: int, cols: int, group: int) -> None:
    x, scales = torch.zeros(rows, cols), torch.zeros(rows, -(-cols // group), dtype=torch.bfloat16)
    codes = torch.zeros(rows, cols if curve.bits == 8 else cols // 2, dtype=torch.uint8)
    backend.encode_companded(x, codes, scales, curve=curve, group=group)
    backend.decode_companded(codes, scales, x, curve=curve, group=group)


def master_weights(high: torch.dtype, low: torch.dtype) -> None:
    x = torch.zeros(4096)
    parts = torch.zeros(4096, dtype=high), torch.zeros(4096, dtype=low)
    backend.encode_split(x, *parts)
    backend.decode_split(*parts, x)


def block_means(block: int) -> None:
    x, mean = torch.zeros(4, 16384), torch.zeros(4, 16384 // block)
    backend.fold_mean(x, mean, block=block)
    backend.unfold(mean, x, block=block)


def on_grids() -> None:
    x, v, codes = torch.zeros(4096), torch.zeros(4096), torch.zeros(4096, dtype=torch.int32)
    short = codes.to(torch.int16)
    backend.encode_uniform(x, codes, grid=Grid(1e-5))
    backend.decode_uniform(codes, x, grid=Grid(1e-5))
    backend.encode_direction(x, v, codes, grid=Grid(1e-2), eps=1e-8)
    backend.decode_direction(codes, v, x, grid=Grid(1e-2), eps=1e-8)
    backend.compare(x, v)
    for per_octave in (8, 10):
        backend.encode_logarithmic(v, short, grid=LogGrid(per_octave))
        backend.decode_logarithmic(short, v, grid=LogGrid(per_octave))


def few() -> None:
    """One call of each stand-alone kernel."""
    for curve, cols in ((curves()[0], 256), (curves()[7], 200)):
        companded(curve, 4, cols, 128)
    master_weights(torch.bfloat16, torch.int8)
    block_means(4)
    on_grids()


EIGHT, ROOTS = StateStorage(Curve("softsign", 8, True), 32), StateStorage(Curve("sqrt", 8, False), 32)
ADAM = {"exp_avg": EIGHT, "exp_avg_sq": ROOTS}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def flash_adam() -> None:
    """Call the step that matters most: AdamW on bf16 parameters with 24-bit master weights and 8-bit moments."""
    fused_step("adam", ADAM, BF16, torch.int8, Hyper(1e-3))


def fast_steps() -> None:
    """Call the fast step in every combination that leads to different code."""
    flash_adam()
    fused_step("adam", ADAM, BF16, torch.int8, Hyper(1e-3, l2=0.1, maximize=True))
    fused_step("lion", {"exp_avg": EIGHT}, BF16, torch.int8, Hyper(1e-3))
    for nesterov in (False, True):
        fused_step("sgd", {"momentum_buffer": EIGHT}, BF16, torch.int8, Hyper(1e-3, momentum=0.9, nesterov=nesterov))


def fused_steps() -> None:
    """Call a fused step in every combination that leads to different code."""
    four, log = StateStorage(Curve("softsign", 4, True), 128), StateStorage(Curve("log", 8, False, 16), 128)
    dense, logs = StateStorage(), StateStorage(Curve("log", 4, False, 2), 128)
    fast_steps()
    fused_step("adam", ADAM, BF16, torch.int8, Hyper(1e-3, stochastic=True, maximize=True), shape=(64, 100))
    fused_step("adam", ADAM, BF16, torch.int16, Hyper(torch.tensor(1e-3), l2=0.1))
    fused_step("adam", ADAM, FP16, torch.int8, Hyper(1e-3), grad=FP32)
    fused_step("adam", {"exp_avg": four, "exp_avg_sq": log}, FP32, None, Hyper(1e-3))
    fused_step("adam", {"exp_avg": dense, "exp_avg_sq": dense}, BF16, None, Hyper(1e-3))
    fused_step("adam", {"exp_avg": four, "exp_avg_sq": logs}, BF16, torch.int8, Hyper(1e-3))
    fused_step("lion", {"exp_avg": dense}, BF16, torch.int8, Hyper(1e-3))
    fused_step("sgd", {}, BF16, torch.int8, Hyper(1e-3))
    for first, second in ((dense, dense), (EIGHT, ROOTS)):
        foam = {"exp_avg": replace(first, block=4), "exp_avg_sq": replace(second, block=4)}
        fused_step("foam", foam, BF16, torch.int8, Hyper(1e-3))
        fused_step("foam", foam, BF16, torch.int8, Hyper(1e-3, decay_first=False, true_tail=False), shape=(64, 99))
        slim = {"exp_avg": first, "exp_avg_sq": StateStorage(dims=(1,))}
        fused_step("slim", slim, BF16, torch.int8, Hyper(1e-3))


def fused_step(
    method: str, formats: dict[str, StateStorage], dtype: torch.dtype, low: torch.dtype | None, hyper: Hyper,
    shape: tuple[int, int] = (64, 256), grad: torch.dtype | None = None,
) -> None:  # fmt: skip
    states = {}
    for name, stored in formats.items():
        rows, cols = shape[0], 1 if stored.dims else -(-shape[1] // (stored.block or 1))
        prefix = "mean." if stored.block or stored.dims else ""
        if stored.curve is None:
            states[name] = {f"{prefix}data": torch.zeros(rows, cols)}
        else:
            width = cols if stored.curve.bits == 8 else -(-cols // 2)
            scales = torch.zeros(rows, -(-cols // stored.group), dtype=torch.bfloat16)
            states[name] = {f"{prefix}codes": torch.zeros(rows, width, dtype=torch.uint8), f"{prefix}scales": scales}
    slot = Slot(
        torch.zeros(shape, dtype=dtype), torch.zeros(()), torch.zeros(()),
        None if low is None else torch.zeros(shape, dtype=low), states, 0, shape,
    )  # fmt: skip
    assert backend.supports(method, formats, dtype, low)
    backend.prepare(method, [slot], formats)([torch.zeros(shape, dtype=grad or dtype)], hyper)


def ends() -> None:
    """One call of each kernel that steps, and of an encoder and a decoder: what an old triton may not understand."""
    flash_adam()
    foam = {name: replace(stored, block=4) for name, stored in ADAM.items()}
    fused_step("foam", foam, FP16, torch.int8, Hyper(1e-3, stochastic=True), shape=(64, 99))
    fused_step("slim", {"exp_avg": StateStorage(), "exp_avg_sq": StateStorage(dims=(1,))}, BF16, None, Hyper(1e-3))
    companded(curves()[7], 4, 200, 128)
    master_weights(torch.float16, torch.int16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", choices=("ends", "few", "codecs", "steps", "fast", "adam"))
    parser.add_argument("--arch", type=lambda text: [int(a) for a in text.split(",")], default=[80, 90, 100])
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    driver = Driver()
    recorder = Recorder(driver, options.arch, options.keep, options.plain)
    triton.runtime.driver.set_active(driver)
    JITFunction.run = lambda function, *args, **kwargs: recorder.run(function, *args, **kwargs)
    for module in (companding, folding, grid, launch, runtime):
        module.on = lambda tensor: contextlib.nullcontext()
    if options.only == "ends":
        ends()
    if options.only == "few":
        few()
    if options.only in (None, "codecs"):
        stand_alone()
    if options.only in (None, "steps"):
        fused_steps()
    if options.only == "fast":
        fast_steps()
    if options.only == "adam":
        flash_adam()
    print(f"triton {triton.__version__}", file=sys.stderr)
    print(json.dumps(recorder.rows, indent=1))
    sys.exit(any(row["faults"] for row in recorder.rows))


if __name__ == "__main__":
    main()
