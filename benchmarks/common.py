"""What the benchmarks share: the machine's description, results files, trained and grown checkpoints, CPU time."""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import statecodec
from statecodec_cli.demo.gpt import GPTConfig
from statecodec_cli.demo.train import TrainConfig, Trainer

ROOT = Path(__file__).parent
CACHE = Path(os.environ.get("STATECODEC_BENCH", ROOT.parent / ".bench"))
RESULTS = ROOT / "results"


def machine() -> dict[str, Any]:
    """What these figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "statecodec": statecodec.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
    }


def record(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json and print it."""
    print(keep(name, result))


def keep(name: str, result: dict[str, Any]) -> str:
    """Write benchmarks/results/NAME.json, whole or not at all; its text."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **result}, indent=1)
    temporary = RESULTS / f".{name}.json.tmp"
    temporary.write_text(text + "\n")
    temporary.replace(RESULTS / f"{name}.json")
    return text


@dataclass
class Spent:
    """CPU seconds (user and system, all threads and children) and wall seconds of a block."""

    cpu: float = 0.0
    wall: float = 0.0


@contextmanager
def spent() -> Iterator[Spent]:
    """Measure a block."""
    gc.collect()
    before, started, result = _cpu(), time.perf_counter(), Spent()
    yield result
    result.cpu, result.wall = _cpu() - before, time.perf_counter() - started


def trained(name: str = "gpt", steps: int = 300, seed: int = 0, **settings: Any) -> Path:
    """A GPT of 10.7 M parameters trained on the standard library's sources with fp32 AdamW; cached."""
    path = CACHE / f"{name}-{steps}-{seed}.pt"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        model = GPTConfig(n_layer=6, n_head=6, n_embd=384)
        config = replace(TrainConfig(seed=seed, batch_size=8, lr=6e-4, decay_steps=4 * steps, model=model), **settings)
        trainer = Trainer(config)
        print(f"training {trainer.num_params / 1e6:.1f} M parameters for {steps} steps ...", flush=True)
        trainer.run(
            steps, lambda step, loss: print(f"  step {step}: {loss:.3f}", flush=True) if step % 50 == 0 else None
        )
        trainer.save(path)
    return path


def grown(nbytes: int, largest: int = 0) -> Path:
    """A checkpoint of about `nbytes` with the trained one's statistics.

    Every matrix becomes four of itself side by side, rows and columns permuted (768 wide, as GPT-2 small), layers again
    and again. With `largest`, each of one parameter's tensors (weight, exp_avg, exp_avg_sq) has that many bytes.
    """
    path = CACHE / f"grown-{nbytes >> 20}-{largest >> 20}.pt"
    if path.exists():
        return path
    base: dict[str, Any] = torch.load(trained(), weights_only=True)
    names = [n for n in base["model"] if n != "lm_head.weight"]
    matrices = [n for n in names if base["model"][n].ndim == 2]
    order = matrices + [n for n in names if n not in matrices]  # the optimizer's groups: decayed first
    generator = torch.Generator().manual_seed(0)
    model: dict[str, torch.Tensor] = {}
    state: dict[int, dict[str, torch.Tensor]] = {}
    total, copy = 0, 0
    while total < nbytes:
        for i, name in enumerate(order):
            moments = base["optimizer"]["state"][i]
            triple: tuple[torch.Tensor, ...] = (base["model"][name], moments["exp_avg"], moments["exp_avg_sq"])
            if largest and copy == 0 and i == 0:
                wide = triple[0].shape[1]
                rows = torch.randint(triple[0].shape[0], (largest // 4 // wide,), generator=generator)
                triple = tuple(t[rows] * (1 + 0.1 * torch.rand(len(rows), 1, generator=generator)) for t in triple)
            else:
                order_of = [
                    torch.cat([torch.randperm(n, generator=generator) for _ in range(2)]) for n in triple[0].shape
                ]
                triple = tuple(_taken(t, order_of) for t in triple)
            model[f"copy{copy}.{name}"] = triple[0].clone()
            state[len(state)] = {
                "step": moments["step"].clone(),
                "exp_avg": triple[1].clone(),
                "exp_avg_sq": triple[2].clone(),
            }
            total += sum(t.numel() * 4 for t in triple)
            if total >= nbytes:
                break
        copy += 1
    group = {**base["optimizer"]["param_groups"][0], "params": list(range(len(state)))}
    torch.save({"model": model, "optimizer": {"state": state, "param_groups": [group]}, "iter_num": 0}, path)
    return path


def _taken(tensor: torch.Tensor, order: list[torch.Tensor]) -> torch.Tensor:
    for dimension, indices in enumerate(order):
        tensor = tensor.index_select(dimension, indices)
    return tensor


def _cpu() -> float:
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
