"""What a stated fraction of one optimizer step costs: bits per value of each part, errors, and the codecs' own rate.

Weights and moments of matrices and kernels (4096 values and more) are encoded on the grids of
`statecodec.choose.budget` and packed as in a file, memory to memory. Beside each part stands the order-0 entropy of its
codes, each tensor by itself. Rates are CPU nanoseconds per parameter (weight, exp_avg and exp_avg_sq), encoding and
packing, unpacking and decoding, the best of `--runs`; the 24-bit split with 8-bit companded moments takes its turns in
the same run.

    python benchmarks/step_budget.py [--steps 60] [--runs 3]        -> benchmarks/results/step_budget.json
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from common import record, trained
from torch import Tensor, nn

from statecodec import kernels
from statecodec.buffers import Pool, ThreadScratch
from statecodec.choose.budget import codes_per_octave
from statecodec.choose.step_size import correction
from statecodec.codecs import Codec, Direction, Logarithmic, Uniform, parse
from statecodec.codecs.chunking import chunks
from statecodec.dtypes import of
from statecodec.format.packing import Packing, decode_record, encode_record
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison

FRACTIONS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
PARTS = ("exp_avg", "exp_avg_sq", "weight")
TODAY = {
    "exp_avg": parse("companded"), "exp_avg_sq": parse("companded(curve=log)"), "weight": parse("split"),
}  # fmt: skip


@dataclass(frozen=True)
class Param:
    """One parameter with its moments."""

    tensors: Mapping[str, Tensor]
    lr: float
    c1: float
    c2: float
    eps: float

    @property
    def numel(self) -> int:
        """How many values it has."""
        return self.tensors["weight"].numel()


@dataclass
class PartCost:
    """What one part of all parameters took."""

    nbytes: int = 0
    entropy: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    made: Comparison = field(default_factory=lambda: NO_DIFFERENCE)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    states = {"gpt": list(gpt(arguments.steps)), "conv": list(conv(arguments.steps))}
    torch.set_num_threads(1)
    found = {name: measured(params, arguments.runs) for name, params in states.items()}
    record("step_budget", {"steps": arguments.steps, **found})


def gpt(count: int) -> Iterator[Param]:
    """The benchmarks' GPT, early in training."""
    state: dict[str, Any] = torch.load(trained("step", count, decay_steps=600), weights_only=True)
    names = [n for n in state["model"] if n != "lm_head.weight"]
    names.sort(key=lambda n: state["model"][n].ndim < 2)  # the optimizer's groups: decayed first
    group = state["optimizer"]["param_groups"][0]
    yield from params((state["model"][n], state["optimizer"]["state"][i], group) for i, n in enumerate(names))


def conv(count: int) -> Iterator[Param]:
    """A small convolutional net with AdamW on images of noisy stripes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, 2),
        nn.ReLU(),
        nn.Conv2d(128, 256, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(count):
        label = torch.randint(10, (32,))
        x = torch.sin(torch.arange(24) * (label[:, None] + 1) * 0.3)[:, None, None, :] + torch.randn(32, 3, 24, 24)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), label).backward()
        optimizer.step()
    group = optimizer.param_groups[0]
    yield from params((p.detach(), optimizer.state[p], group) for p in net.parameters())


def params(found: Iterator[tuple[Tensor, dict[str, Tensor], dict[str, Any]]]) -> Iterator[Param]:
    """The parameters that are large enough to be encoded."""
    for w, state, group in found:
        if w.numel() >= 4096:
            c1, c2 = (correction(beta, float(state["step"])) for beta in group["betas"])
            yield Param({"weight": w, **{k: state[k] for k in PARTS[:2]}}, group["lr"], c1, c2, group["eps"])


def measured(state: list[Param], runs: int) -> dict[str, Any]:
    """Every fraction, and today's codecs, on one state."""
    plans: dict[str, list[dict[str, Codec]]] = {f"{f:g}": [on_grids(p, f) for p in state] for f in FRACTIONS}
    plans["split, companded"] = [TODAY] * len(state)
    best: dict[str, dict[str, PartCost]] = {}
    for run in range(runs + 1):  # the first turn compiles; it does not count
        for name, plan in plans.items():
            now = everything(state, plan)
            for part, spent in now.items():
                if run > 1:
                    spent.encode = min(spent.encode, best[name][part].encode)
                    spent.decode = min(spent.decode, best[name][part].decode)
            best[name] = now
    numel = sum(p.numel for p in state)
    return {"params": numel, "fractions": {name: described(spent, numel) for name, spent in best.items()}}


def on_grids(p: Param, fraction: float) -> dict[str, Codec]:
    """The codecs of a parameter's three tensors: the same fraction of one step for the direction and the weight."""
    m, v, w = (p.tensors[k].double() for k in PARTS)
    eps = p.eps * math.sqrt(p.c2)
    direction = (m / (v.sqrt() + eps))[v > 0].square().mean().sqrt().item()
    moved = p.lr * direction * math.sqrt(p.c2) / p.c1
    return {
        "exp_avg": Direction(fraction * direction * math.sqrt(12), eps),
        "exp_avg_sq": Logarithmic(codes_per_octave(fraction)),
        "weight": Uniform(max(fraction * moved * math.sqrt(12), 2**-16 * w.square().mean().sqrt().item())),
    }


def everything(state: list[Param], plan: list[dict[str, Codec]]) -> dict[str, PartCost]:
    """Encode, pack, unpack and decode every tensor."""
    spent = {part: PartCost() for part in PARTS}
    for p, codecs in zip(state, plan, strict=True):
        for part in PARTS:
            one(spent[part], codecs[part], p.tensors[part], p.tensors["exp_avg_sq"])
    return spent


def one(spent: PartCost, codec: Codec, x: Tensor, v: Tensor) -> None:
    """One tensor, chunk by chunk."""
    pool, host, packing = _POOL, kernels.host(), Packing()
    for c in chunks(codec, tuple(x.shape), of(x.dtype)):
        piece, given = x.reshape(-1)[c.start : c.stop].view(c.shape), {"exp_avg_sq": v.reshape(-1)[c.start : c.stop]}
        specs = codec.parts(c.shape, of(x.dtype))
        parts = {k: _SCRATCH.take("parts", spec.dtype.torch, spec.shape, k) for k, spec in specs.items()}
        again = [_SCRATCH.take("again", spec.dtype.torch, spec.shape, k) for k, spec in specs.items()]
        out = _SCRATCH.take("out", x.dtype, c.shape)
        started = time.thread_time()
        made = codec.encode_into(piece, parts, host, given)
        buffer, length = encode_record(list(parts.values()), packing, pool)
        encoded = time.thread_time()
        decode_record(buffer[:length], again, pool)
        codec.decode_into(dict(zip(parts, again, strict=True)), out, host, given)
        spent.decode += time.thread_time() - encoded
        spent.encode += encoded - started
        spent.nbytes += length
        spent.entropy += sum(entropy(t) for t in parts.values())
        spent.made = spent.made.merged(made or host.compare(piece.reshape(-1), out.reshape(-1)))
        pool.give(buffer)


_POOL, _SCRATCH = Pool(), ThreadScratch()


def entropy(codes: Tensor) -> float:
    """Order-0 entropy of all elements, in bits."""
    plain = codes.view(-1).to(torch.float32 if codes.is_floating_point() else torch.int64)
    counts = plain.unique(return_counts=True)[1]
    return float((counts.double() * (codes.numel() / counts.double()).log2()).sum())


def described(spent: dict[str, PartCost], numel: int) -> dict[str, Any]:
    """The figures of one plan."""
    found: dict[str, Any] = {"bytes_per_param": sum(s.nbytes for s in spent.values()) / numel}
    found["encode_ns"] = sum(s.encode for s in spent.values()) / numel * 1e9
    found["decode_ns"] = sum(s.decode for s in spent.values()) / numel * 1e9
    for part, s in spent.items():
        relative = math.sqrt(s.made.sum_sq_diff / s.made.sum_sq)
        found[part] = {"bits": 8 * s.nbytes / numel, "entropy": s.entropy / numel, "relative_rms": relative}
    return found


if __name__ == "__main__":
    main()
