"""Every optimizer on the small GPT: final validation loss, bytes of state, step time, against torch's AdamW.

    python benchmarks/convergence.py --steps 200 --seeds 3           # everything that is not in the results yet
    python benchmarks/convergence.py --only foam,muon --seeds 1      # a part
    python benchmarks/convergence.py --table                         # print it (tables.py puts it into the docs)

Bytes of the standard library's sources, context 96, a GPT of 0.9 M parameters, batch 8, warm-up then cosine. With the
first seed every optimizer runs at lr 1e-3 and at the rates of its own small grid, with the other seeds at the best of
those. Runs of one seed see the same batches in the same order: differences are paired. A run that is in the results
file is not repeated, and the file is written after each: the benchmark can be cut anywhere and taken up again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tables
import torch
from common import RESULTS, machine

from statecodec import optim
from statecodec_cli.demo.data import standard_library
from statecodec_cli.demo.gpt import GPTConfig
from statecodec_cli.demo.train import TrainConfig, Trainer

MODEL = GPTConfig(block_size=96, n_layer=4, n_head=4, n_embd=128)
EQUAL_LR = 1e-3
RULES = {
    "*.attn.c_attn.weight": [1],
    "*.c_proj.weight": [0],
    "*.c_fc.weight": [0],
    "*wte.weight": [1],
    "*wpe.weight": [1],
}
PATH = RESULTS / "convergence.json"

Factory = Callable[[Any, float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """One row: how to make it from (named parameters, lr), and the learning rates worth trying besides EQUAL_LR."""

    make: Factory
    grid: tuple[float, ...] = ()
    bf16: bool = False
    variant: bool = False  # of a row above: fewer seeds by default


def ours(cls: Any, **options: Any) -> Factory:
    return lambda named, lr: cls(named, lr=lr, **{"weight_decay": 0.1, **options})


def adam_like(cls: Any, **options: Any) -> Factory:
    return ours(cls, **{"betas": (0.9, 0.95), **options})


def torch_adamw(named: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


ADAM = (3e-3,)
WIDE = (3e-3, 1e-2)
HIGH = (1e-2,)
SGD = (0.1, 0.3)
CONTENDERS: dict[str, Contender] = {
    "torch AdamW": Contender(torch_adamw, WIDE),
    "AdamW companded8": Contender(adam_like(optim.AdamW), ADAM),
    "AdamW companded8, bf16 + split24": Contender(adam_like(optim.AdamW), ADAM, bf16=True),
    "FOAM level 2": Contender(adam_like(optim.FOAM, level=2), WIDE),
    "SlimAdam": Contender(adam_like(optim.SlimAdam, rules=RULES), ADAM),
    "LoRA-Pre rank 16": Contender(adam_like(optim.LoRAPre, rank=16), WIDE),
    "Muon companded8": Contender(adam_like(optim.Muon), WIDE),
    "Lion companded8": Contender(ours(optim.Lion, betas=(0.9, 0.99), weight_decay=0.3), (3e-4,)),
    "SGD momentum companded8": Contender(ours(optim.SGD, momentum=0.9, weight_decay=0.0), SGD),
    "SlimAdam, companded8 first moment": Contender(
        adam_like(optim.SlimAdam, rules=RULES, moments="companded8"), variant=True
    ),
    "FOAM level 2, companded8": Contender(adam_like(optim.FOAM, level=2, moments="companded8"), HIGH, variant=True),
    "LoRA-Pre Muon rank 16": Contender(adam_like(optim.LoRAPre, rank=16, base="muon"), HIGH),
    "FOAM level 3": Contender(adam_like(optim.FOAM, level=3), HIGH, variant=True),
    "LoRA-Pre rank 16, paper": Contender(adam_like(optim.LoRAPre, rank=16, variant="paper"), HIGH, variant=True),
    "LoRA-Pre rank 16, matched": Contender(
        adam_like(optim.LoRAPre, rank=16, bias_correction="matched"), HIGH, variant=True
    ),
    "FOAM level 2, official": Contender(adam_like(optim.FOAM, level=2, variant="official"), HIGH, variant=True),
    "FOAM level 2, paper": Contender(adam_like(optim.FOAM, level=2, variant="paper"), HIGH, variant=True),
    "AdamW companded8, bf16 alone": Contender(adam_like(optim.AdamW, master_weights=None), bf16=True, variant=True),
    "AdamW companded8, bf16 alone, stochastic": Contender(
        adam_like(optim.AdamW, master_weights=None, stochastic_rounding=True), bf16=True, variant=True
    ),
    "Muon dense": Contender(adam_like(optim.Muon, moments="dense"), HIGH, variant=True),
    "FOAM level 1": Contender(adam_like(optim.FOAM, level=1), HIGH, variant=True),
    "LoRA-Pre rank 8": Contender(adam_like(optim.LoRAPre, rank=8), HIGH, variant=True),
    "Adam (L2) companded8": Contender(adam_like(optim.Adam, weight_decay=0.0)),
    "SGDW momentum companded8": Contender(ours(optim.SGDW, momentum=0.9, weight_decay=1e-3), (0.3,)),
}


def run(name: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once and measure."""
    torch.set_num_threads(1)
    contender = CONTENDERS[name]
    config = TrainConfig(batch_size=8, lr=lr, warmup=24, decay_steps=steps, seed=seed, model=MODEL, eval_batches=16)
    trainer = Trainer(config, corpus=standard_library())
    if contender.bf16:
        trainer.model.to(torch.bfloat16)
    optimizer = trainer.optimizer = contender.make(list(trainer.model.named_parameters()), lr)
    spent: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: spent.append(-time.process_time()))
    optimizer.register_step_post_hook(lambda *_: spent.append(time.process_time()))
    trainer.run(steps)
    times = [b + a for a, b in zip(spent[::2], spent[1::2], strict=True)][5:]
    return {
        "name": name, "lr": lr, "seed": seed, "steps": steps, "val_loss": trainer.validate(),
        "state_bytes_per_param": round(state_bytes(optimizer) / trainer.num_params, 3),
        "step_ms": round(1e3 * statistics.median(times), 2),
    }  # fmt: skip


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    if isinstance(optimizer, optim.StateOptimizer):
        return optimizer.state_nbytes()
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))


class Results:
    """The results file: a list of runs, appended to."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        document = json.loads(path.read_text()) if path.exists() else {"runs": []}
        self.runs: list[dict[str, Any]] = document["runs"]

    def find(self, name: str, lr: float, seed: int) -> dict[str, Any] | None:
        wanted = {"name": name, "lr": lr, "seed": seed, "steps": self.steps}
        return next((r for r in self.runs if wanted.items() <= r.items()), None)

    def get(self, name: str, lr: float, seed: int) -> dict[str, Any]:
        found = self.find(name, lr, seed)
        if found is None:
            found = run(name, lr, seed, self.steps)
            print(json.dumps(found), flush=True)
            self.runs.append(found)
            text = json.dumps({"machine": machine(), "runs": self.runs}, indent=1)
            self.path.parent.mkdir(exist_ok=True)
            self.path.with_suffix(".tmp").write_text(text + "\n")
            self.path.with_suffix(".tmp").replace(self.path)
        return found

    def best_lr(self, name: str) -> float:
        """The best rate of those that were tried with the first seed."""
        tried = {
            r["lr"]: r["val_loss"]
            for r in self.runs
            if r["name"] == name and r["seed"] == 0 and r["steps"] == self.steps
        }
        return min(tried, key=lambda lr: tried[lr])


def measure(names: list[str], seeds: int, variant_seeds: int, results: Results) -> None:
    for name in sorted(names, key=lambda n: CONTENDERS[n].variant):
        for lr in (EQUAL_LR, *CONTENDERS[name].grid):
            results.get(name, lr, 0)
        for seed in range(1, variant_seeds if CONTENDERS[name].variant else seeds):
            results.get(name, results.best_lr(name), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variant-seeds", type=int, default=1, help="seeds of the rows that vary another row")
    parser.add_argument("--only", default="", help="names or parts of names, comma separated")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    results = Results(args.out, args.steps)
    parts = [part.strip().lower() for part in args.only.split(",") if part.strip()]
    names = [n for n in CONTENDERS if not parts or any(part in n.lower() for part in parts)]
    if not args.table:
        measure(names, args.seeds, args.variant_seeds, results)
    print("\n".join(tables.convergence({"runs": results.runs})))


if __name__ == "__main__":
    main()
