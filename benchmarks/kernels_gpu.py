"""Rates of the stand-alone Triton kernels on a GPU, against a device-to-device copy and against their own traffic.

    python benchmarks/kernels_gpu.py [--elements 268435456]          -> results/kernels_gpu.json
    TRITON_INTERPRET=1 python benchmarks/kernels_gpu.py --tiny       # no GPU: does it run? The times mean nothing

The gate comes first: every kernel must give the reference's bits on this device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from optim_gpu import RESULTS, Clock, copy_bandwidth, machine
from torch import Tensor

from statecodec import kernels
from statecodec.kernels.curves import Curve

CURVES = {
    "softsign8": Curve("softsign", 8, True),
    "sqrt8": Curve("sqrt", 8, False),
    "log8": Curve("log", 8, False, 16),
    "log4": Curve("log", 4, False, 2),
}
COLS, GROUP = 4096, 128

Kernel = Callable[[kernels.Backend, dict[str, Tensor]], Any]


def cases(rows: int, device: torch.device) -> Iterator[tuple[str, Kernel, dict[str, Tensor], tuple[str, ...]]]:
    """(name, call, tensors, what it writes). A decoding case follows the encoding one whose output it reads."""
    shape = (rows, COLS)
    x = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))
    for name, curve in CURVES.items():
        width = COLS if curve.bits == 8 else COLS // 2
        tensors = {
            "x": x if curve.signed else x.square(),
            "codes": torch.zeros(rows, width, dtype=torch.uint8, device=device),
            "scales": torch.zeros(rows, COLS // GROUP, dtype=torch.bfloat16, device=device),
        }

        def encode(b: kernels.Backend, t: dict[str, Tensor], curve: Curve = curve) -> int:
            return b.encode_companded(t["x"], t["codes"], t["scales"], curve=curve, bits=curve.bits, group=GROUP)

        def decode(b: kernels.Backend, t: dict[str, Tensor], curve: Curve = curve) -> None:
            b.decode_companded(t["codes"], t["scales"], t["x"], curve=curve, bits=curve.bits, group=GROUP)

        yield f"encode-{name}", encode, tensors, ("codes", "scales")
        yield f"decode-{name}", decode, tensors, ("x",)
    parts = {
        "x": x.view(-1).clone(),
        "high": torch.zeros(rows * COLS, dtype=torch.bfloat16, device=device),
        "low": torch.zeros(rows * COLS, dtype=torch.int8, device=device),
    }
    yield "encode-split24", lambda b, t: b.encode_split(t["x"], t["high"], t["low"]), parts, ("high", "low")
    yield "decode-split24", lambda b, t: b.decode_split(t["high"], t["low"], t["x"]), parts, ("x",)
    fold = {"x": x.clone(), "mean": torch.zeros(rows, COLS // 4, device=device)}
    yield "fold-2", lambda b, t: b.fold_mean(t["x"], t["mean"], block=4), fold, ("mean",)
    yield "unfold-2", lambda b, t: b.unfold(t["mean"], t["x"], block=4), fold, ("x",)


def gate(device: torch.device) -> list[str]:
    """Names of the kernels that differ from the reference in any bit."""
    triton, reference = kernels.get("triton"), kernels.get("reference")
    wrong = []
    for name, call, tensors, written in cases(4, device):
        expected = {k: t.cpu().clone() for k, t in tensors.items()}
        call(reference, expected)
        call(triton, tensors)
        same = (torch.equal(tensors[k].cpu().view(torch.uint8), expected[k].view(torch.uint8)) for k in written)
        wrong += [] if all(same) else [name]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 28)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not (options.tiny and interpreted):
        sys.exit("needs a CUDA device; without one, TRITON_INTERPRET=1 and --tiny show that it runs")
    device = torch.device("cpu" if interpreted else "cuda")
    wrong = gate(device)
    if wrong:
        sys.exit(f"not the reference's bits, nothing was timed: {', '.join(wrong)}")
    clock, triton = Clock(device), kernels.get("triton")
    copy = copy_bandwidth(device, clock)
    rows: dict[str, Any] = {}
    for name, call, tensors, _ in cases(8 if options.tiny else options.elements // COLS, device):
        times, _ = clock(lambda call=call, tensors=tensors: call(triton, tensors), options.steps)
        seconds = statistics.median(times[options.steps // 4 :]) * 1e-3
        traffic = sum(t.nbytes for t in tensors.values())
        rows[name] = {
            "ms": round(seconds * 1e3, 4),
            "fp32_gb_per_s": round(tensors["x"].nbytes / seconds / 1e9, 1),
            "gb_per_s": round(traffic / seconds / 1e9, 1),
            "of_copy": round(traffic / seconds / copy, 3),
        }
    result = {"machine": machine(device), "copy_gb_per_s": round(copy / 1e9, 1), "kernels": rows}
    text = json.dumps(result, indent=1)
    print(text)
    if device.type == "cuda":
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "kernels_gpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
