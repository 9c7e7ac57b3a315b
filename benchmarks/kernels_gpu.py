"""Rates of the stand-alone Triton kernels on a GPU, against a device-to-device copy and against their own traffic.

    python benchmarks/kernels_gpu.py [--elements 268435456]          -> results/kernels_gpu.json
    TRITON_INTERPRET=1 python benchmarks/kernels_gpu.py --rehearse   # no GPU

The gate comes first: every kernel must give the reference's bits on this device.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from on_gpu import Clock, copy_bandwidth, device_of, keep, machine, parser
from torch import Tensor

from statecodec import kernels
from statecodec.kernels.curves import Curve
from statecodec.kernels.grids import Grid, LogGrid

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
            return b.encode_companded(t["x"], t["codes"], t["scales"], curve=curve, group=GROUP)

        def decode(b: kernels.Backend, t: dict[str, Tensor], curve: Curve = curve) -> None:
            b.decode_companded(t["codes"], t["scales"], t["x"], curve=curve, group=GROUP)

        yield f"encode-{name}", encode, tensors, ("codes", "scales")
        yield f"decode-{name}", decode, tensors, ("x",)
    parts = {
        "x": x.view(-1).clone(),
        "high": torch.zeros(rows * COLS, dtype=torch.bfloat16, device=device),
        "low": torch.zeros(rows * COLS, dtype=torch.int8, device=device),
    }
    yield "encode-split24", lambda b, t: b.encode_split(t["x"], t["high"], t["low"]), parts, ("high", "low")
    yield "decode-split24", lambda b, t: b.decode_split(t["high"], t["low"], t["x"]), parts, ("x",)
    yield from on_grids(x, rows)
    fold = {"x": x.clone(), "mean": torch.zeros(rows, COLS // 4, device=device)}
    yield "fold-2", lambda b, t: b.fold_mean(t["x"], t["mean"], block=4), fold, ("mean",)
    yield "unfold-2", lambda b, t: b.unfold(t["mean"], t["x"], block=4), fold, ("x",)


def on_grids(x: Tensor, rows: int) -> Iterator[tuple[str, Kernel, dict[str, Tensor], tuple[str, ...]]]:
    """The codecs that presets use."""
    flat, linear, log = x.view(-1), Grid(1e-3), LogGrid(8)
    codes = torch.zeros(rows * COLS, dtype=torch.int32, device=x.device)
    parts = {"x": flat.clone(), "codes": codes}
    yield "encode-uniform", lambda b, t: b.encode_uniform(t["x"], t["codes"], grid=linear), parts, ("codes",)
    yield "decode-uniform", lambda b, t: b.decode_uniform(t["codes"], t["x"], grid=linear), parts, ("x",)
    beside = {"x": flat.clone(), "v": flat.square(), "codes": codes.clone()}

    def encode(b: kernels.Backend, t: dict[str, Tensor]) -> Any:
        return b.encode_direction(t["x"], t["v"], t["codes"], grid=linear, eps=1e-8)

    def decode(b: kernels.Backend, t: dict[str, Tensor]) -> None:
        b.decode_direction(t["codes"], t["v"], t["x"], grid=linear, eps=1e-8)

    yield "encode-direction", encode, beside, ("codes",)
    yield "decode-direction", decode, beside, ("x",)
    short = {"x": flat.square(), "codes": codes.to(torch.int16)}
    yield "encode-logarithmic", lambda b, t: b.encode_logarithmic(t["x"], t["codes"], grid=log), short, ("codes",)
    yield "decode-logarithmic", lambda b, t: b.decode_logarithmic(t["codes"], t["x"], grid=log), short, ("x",)


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
    arguments = parser(__doc__, "kernels_gpu.json")
    arguments.add_argument("--elements", type=int, default=1 << 28)
    arguments.add_argument("--steps", type=int, default=20)
    options = arguments.parse_args()
    device = device_of(options.rehearse)
    wrong = gate(device)
    if wrong:
        sys.exit(f"not the reference's bits, nothing was timed: {', '.join(wrong)}")
    clock, triton = Clock(device), kernels.get("triton")
    copy = copy_bandwidth(device, clock)
    rows: dict[str, Any] = {}
    result = {"machine": machine(device), "copy_gb_per_s": round(copy / 1e9, 1), "kernels": rows}
    for name, call, tensors, _ in cases(8 if options.rehearse else options.elements // COLS, device):
        times, _ = clock(partial(call, triton, tensors), options.steps)
        seconds = statistics.median(times[options.steps // 4 :]) * 1e-3
        traffic = sum(t.nbytes for t in tensors.values())
        rows[name] = {
            "ms": round(seconds * 1e3, 4),
            "fp32_gb_per_s": round(tensors["x"].nbytes / seconds / 1e9, 1),
            "gb_per_s": round(traffic / seconds / 1e9, 1),
            "of_copy": round(traffic / seconds / copy, 3),
        }
        print(name, rows[name], file=sys.stderr, flush=True)
        keep(result, options.output)


if __name__ == "__main__":
    main()
