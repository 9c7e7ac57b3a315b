"""Step time, bandwidth and memory of AdamW on a GPU: ours against torch's fused one, flashoptim, bitsandbytes, torchao.

    python benchmarks/optim_gpu.py                        # 100 M, 1 B and many small tensors -> results/optim_gpu.json
    python benchmarks/optim_gpu.py --sets small --only statecodec,flashoptim
    python benchmarks/optim_gpu.py --tune                 # shapes of our launch, on the sets given
    TRITON_INTERPRET=1 python benchmarks/optim_gpu.py --rehearse   # no GPU

First the gate: fused steps must equal the generic path on this device, or nothing is timed. Times are CUDA events
around `step()`, medians; `host_ms` is how long Python was busy. Traffic counts every stored byte once per read and once
per write, whatever a kernel really moves, and is set against a device-to-device copy measured in the same run.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from on_gpu import Clock, copy_bandwidth, device_of, keep, machine, parser
from torch import Tensor, nn

from statecodec import optim

Shapes = list[tuple[int, ...]]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def gpt(layers: int, width: int, vocabulary: int) -> Shapes:
    """GPT-2: biases, layer norms, tied head."""
    block: Shapes = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,),
        (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (1024, width), *(block * layers), (width,), (width,)]


def llama(layers: int, width: int, heads: int, inner: int, vocabulary: int) -> Shapes:
    """Llama with grouped queries: no biases, separate head."""
    block: Shapes = [
        (width, width), (heads, width), (heads, width), (width, width), (inner, width), (inner, width), (width, inner),
        (width,), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), *(block * layers), (width,), (vocabulary, width)]


SETS: dict[str, Shapes] = {
    "100m": gpt(12, 768, 50304),
    "1b": llama(22, 2048, 256, 5632, 32000),
    "small": [(64, 64), (256,), (16, 1024), (1024, 16), (128, 128)] * 400,
    "tiny": [(40, 128), (128,), (7, 90), (64,)],
}


@dataclass(frozen=True)
class Contender:
    """One optimizer: how to make it, for parameters of what dtype, what it needs installed, whether to capture it."""

    make: Make
    dtype: torch.dtype = torch.bfloat16
    needs: str | None = None
    captured: bool = False
    tiny: bool = False  # runs without a GPU


def _ours(cls: Any = optim.AdamW, **options: Any) -> Make:
    return lambda params: cls(_named(params), lr=1e-4, weight_decay=0.1, fused=True, **options)


def _theirs(module: str, name: str, **options: Any) -> Make:
    return lambda params: getattr(importlib.import_module(module), name)(params, lr=1e-4, weight_decay=0.1, **options)


def _named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layers.{i}.q_proj.weight", p) for i, p in enumerate(params)]


LOG = {"exp_avg": "companded(group=128)", "exp_avg_sq": "companded(curve=log,group=128)"}
NIBBLES = {"exp_avg": "companded(bits=4,group=128)", "exp_avg_sq": "companded(curve=log,bits=4,group=128)"}
CONTENDERS: dict[str, Contender] = {
    "statecodec": Contender(_ours(), tiny=True),
    "statecodec-graph": Contender(_ours(), captured=True),
    "statecodec-log128": Contender(_ours(moments=LOG), tiny=True),
    "statecodec-4bit": Contender(_ours(moments=NIBBLES), tiny=True),
    "statecodec-stochastic": Contender(_ours(stochastic_rounding=True), tiny=True),
    "statecodec-fp32": Contender(_ours(moments="dense"), torch.float32, tiny=True),
    "statecodec-foam": Contender(_ours(optim.FOAM), tiny=True),
    "statecodec-slim": Contender(_ours(optim.SlimAdam, rules={"*": [1]}), tiny=True),
    "statecodec-lion": Contender(_ours(optim.Lion), tiny=True),
    "torch-fused-fp32": Contender(_theirs("torch.optim", "AdamW", fused=True), torch.float32, tiny=True),
    "torch-fused-bf16": Contender(_theirs("torch.optim", "AdamW", fused=True), tiny=True),
    "torch-foreach-fp32": Contender(_theirs("torch.optim", "AdamW", foreach=True), torch.float32, tiny=True),
    "flashoptim": Contender(_theirs("flashoptim", "FlashAdamW"), needs="flashoptim"),
    "bitsandbytes-8bit": Contender(_theirs("bitsandbytes.optim", "AdamW8bit"), needs="bitsandbytes"),
    "torchao-8bit": Contender(_theirs("torchao.optim", "AdamW8bit"), needs="torchao"),
}


def gate(device: torch.device) -> list[str]:
    """What differs between fused and generic steps on this device; the generic ones run on the CPU. Empty is good."""
    wrong = []
    for cls in (optim.AdamW, optim.Lion):
        weights = {}
        for fused in (False, True):
            place = device if fused else torch.device("cpu")
            generator = torch.Generator().manual_seed(0)
            shapes = [(64, 256), (5, 70), (1000,)]
            params = [nn.Parameter(torch.randn(s, generator=generator).bfloat16().to(place)) for s in shapes]
            optimizer = cls(params, lr=1e-2, weight_decay=0.1, fused=fused, dense_below=0)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(place)
                optimizer.step()
            weights[fused] = [optimizer.master_weight(p).cpu() for p in params]
        for a, b in zip(weights[False], weights[True], strict=True):
            if not torch.equal(a, b):
                wrong.append(f"{cls.__name__}: {int((a != b).sum())} of {a.numel()} weights of shape {tuple(a.shape)}")
    return wrong


def build(shapes: Shapes, contender: Contender, device: torch.device) -> tuple[list[nn.Parameter], Any]:
    """Parameters with gradients, and the optimizer."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        p = nn.Parameter(torch.empty(shape, dtype=contender.dtype, device=device).normal_(0, 0.02, generator=generator))
        p.grad = torch.empty_like(p).normal_(0, 1e-3, generator=generator)
        params.append(p)
    return params, contender.make(params)


def measure(shapes: Shapes, contender: Contender, device: torch.device, steps: int, copy: float) -> dict[str, Any]:
    """One row of the table."""
    clock = Clock(device)
    before = _allocated(device)
    params, optimizer = build(shapes, contender, device)
    held = _allocated(device)
    for _ in range(3):
        optimizer.step()
    step: Callable[[], Any] = optimizer.step
    if contender.captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        step = graph.replay
    if clock.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    states = _allocated(device) - held if clock.cuda else _state_nbytes(optimizer)
    clock(step, 3)
    times, host = clock(step, steps)
    peak = torch.cuda.max_memory_allocated() - before if clock.cuda else 0
    n = sum(p.numel() for p in params)
    weights = sum(p.numel() * p.element_size() for p in params)
    traffic = 2 * (weights + states) + weights
    seconds = statistics.median(times) * 1e-3
    return {
        "ms": round(seconds * 1e3, 4), "best_ms": round(min(times), 4), "host_ms": round(statistics.median(host), 4),
        "parameters": n, "tensors": len(params), "state_bytes_per_parameter": round(states / n, 3),
        "traffic_bytes_per_parameter": round(traffic / n, 3), "gb_per_s": round(traffic / seconds / 1e9, 1),
        "of_copy": round(traffic / seconds / copy, 3), "peak_bytes_per_parameter": round(peak / n, 3),
    }  # fmt: skip


def row(shapes: Shapes, contender: Contender, device: torch.device, steps: int, copy: float) -> dict[str, Any]:
    """`measure`, but a published package that does not run here costs its own row only."""
    try:
        return measure(shapes, contender, device, steps, copy)
    except Exception as error:
        if contender.needs is None:
            raise
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _state_nbytes(optimizer: Any) -> int:
    if isinstance(optimizer, optim.StateOptimizer):
        return optimizer.state_nbytes()
    return sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))


def tunings() -> Iterator[dict[str, int]]:
    """Launch shapes worth trying. Each is another launch of its own: an in-place step must never be autotuned."""
    for count, run in ((32, 8), (32, 4), (32, 16), (64, 8)):
        yield {"COUNT": count, "RUN": run}


def tune(shapes: Shapes, device: torch.device, steps: int, copy: float) -> list[dict[str, Any]]:
    """The plain AdamW step under every launch shape, slowest last."""
    from statecodec.kernels.triton import fast

    usual = {"COUNT": fast.COUNT, "RUN": fast.RUN}
    rows = []
    for setting in [*tunings(), usual]:
        for name, value in setting.items():
            setattr(fast, name, value)
        rows.append({**setting, **measure(shapes, CONTENDERS["statecodec"], device, steps, copy)})
    return sorted(rows, key=lambda row: row["ms"])


def main() -> None:
    arguments = parser(__doc__, "optim_gpu.json")
    arguments.add_argument("--sets", default="100m,small,1b")
    arguments.add_argument("--only", help="contenders, by name", default=",".join(CONTENDERS))
    arguments.add_argument("--steps", type=int, default=30)
    arguments.add_argument("--tune", action="store_true")
    options = arguments.parse_args()
    device = device_of(options.rehearse)
    wrong = gate(device)
    if wrong:
        sys.exit("fused steps differ from the generic path, nothing was timed:\n" + "\n".join(wrong))
    copy = copy_bandwidth(device, Clock(device))
    result: dict[str, Any] = {"machine": machine(device), "copy_gb_per_s": round(copy / 1e9, 1), "sets": {}}
    for name in ["tiny"] if options.rehearse else options.sets.split(","):
        rows: dict[str, Any] = {}
        result["sets"][name] = rows
        if options.tune:
            rows["tuning"] = tune(SETS[name], device, options.steps, copy)
        for contender_name in [] if options.tune else options.only.split(","):
            contender = CONTENDERS[contender_name]
            if contender.needs and importlib.util.find_spec(contender.needs) is None:
                rows[contender_name] = {"missing": contender.needs}
            elif device.type == "cuda" or contender.tiny:
                rows[contender_name] = row(SETS[name], contender, device, options.steps, copy)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            print(name, contender_name, rows.get(contender_name, "on a GPU only"), file=sys.stderr, flush=True)
            keep(result, options.output)
    keep(result, options.output)


if __name__ == "__main__":
    main()
