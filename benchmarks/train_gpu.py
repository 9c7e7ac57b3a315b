"""Training a 124 M parameter GPT on one GPU: loss, tokens per second and peak memory of AdamW, ours and others'.

    python benchmarks/train_gpu.py [--seconds 60] [--only statecodec,torch-fp32]   -> results/train_gpu.json
    TRITON_INTERPRET=1 python benchmarks/train_gpu.py --rehearse                   # no GPU: a tiny model, seconds

The sizes are GPT-2 small's (12 layers, 768 wide, 50304 rows of vocabulary, 1024 positions), the text is Python's own
standard library, byte by byte. Every contender trains as long, on the same batches in the same order, under bf16
autocast, from the same weights. The clock starts after the warm-up steps, which compile. `loss` is over fixed
validation batches at the end; `loss_at` are means over the last steps up to one that every contender reached.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))

import torch
from on_gpu import device_of, keep, machine, parser
from torch import Tensor

from statecodec import optim
from statecodec_cli.demo.data import Corpus, standard_library
from statecodec_cli.demo.gpt import GPT, GPTConfig

LR, DECAY, CLIP, BETAS, WARMUP = 3e-4, 0.1, 1.0, (0.9, 0.95), 50
OVER = 20  # steps that a mean of training losses is over


@dataclass(frozen=True)
class Plan:
    """What is trained, for how long."""

    model: GPTConfig
    batch: int
    seconds: float
    first: int = 10  # warm-up steps, which are not timed
    validation: int = 8  # batches


PLAN = Plan(GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768), 16, 60.0)
TINY = Plan(GPTConfig(block_size=32, vocab_size=256, n_layer=1, n_head=2, n_embd=32), 2, 0.5, 1, 1)


@dataclass(frozen=True)
class Contender:
    """An optimizer, the dtype of its parameters, and the package that it needs."""

    make: Callable[[Any], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32
    needs: str | None = None


def _ours(groups: Any) -> torch.optim.Optimizer:
    return optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)


def _torch(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)


def _package(module: str, name: str) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: getattr(importlib.import_module(module), name)(groups, lr=LR, betas=BETAS)


CONTENDERS = {
    "statecodec": Contender(_ours, torch.bfloat16),
    "torch-fp32": Contender(_torch),
    "torch-bf16": Contender(_torch, torch.bfloat16),
    "flashoptim": Contender(_package("flashoptim", "FlashAdamW"), torch.bfloat16, "flashoptim"),
    "bitsandbytes": Contender(_package("bitsandbytes.optim", "AdamW8bit"), torch.float32, "bitsandbytes"),
}


class TrainingRun:
    """One contender's training."""

    def __init__(self, contender: Contender, plan: Plan, corpus: Corpus, device: torch.device) -> None:
        torch.manual_seed(0)
        self.plan, self.corpus, self.device = plan, corpus, device
        self.model = GPT(plan.model).to(device, contender.dtype)
        self.optimizer = contender.make(self.model.parameter_groups(DECAY))
        self.losses: list[Tensor] = []  # on the device: reading one would wait for it

    def step(self) -> None:
        """One step on the batch of its number."""
        number = len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * min(1.0, (number + 1) / WARMUP)
        loss = self.loss(number, "train")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(loss.detach())

    def loss(self, number: int, split: str) -> Tensor:
        """Of one batch."""
        tokens, targets = self.corpus.batch(
            number, seed=0, batch_size=self.plan.batch, block_size=self.plan.model.block_size, split=split
        )
        with torch.autocast(self.device.type, torch.bfloat16):
            found: Tensor = self.model(self.sent(tokens), self.sent(targets))
        return found

    def sent(self, tokens: Tensor) -> Tensor:
        """Tokens on the device, without waiting."""
        return tokens.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tokens

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def train(self) -> float:
        """Train as long as planned; returns the seconds it took, warm-up aside."""
        for _ in range(self.plan.first):
            self.step()
        self.wait()
        started = time.perf_counter()
        while time.perf_counter() - started < self.plan.seconds:
            for _ in range(5):
                self.step()
            self.wait()
        return time.perf_counter() - started

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over fixed validation batches."""
        self.model.eval()
        return statistics.fmean(self.loss(i, "val").item() for i in range(self.plan.validation))


def measure(contender: Contender, plan: Plan, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """One row of the table, and `losses`, one a step."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = TrainingRun(contender, plan, corpus, device)
    seconds = run.train()
    steps = len(run.losses)
    tokens = (steps - plan.first) * plan.batch * plan.model.block_size
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "loss": round(run.validate(), 4), "tokens_per_s": round(tokens / seconds), "peak_gb": round(peak / 1e9, 3),
        "steps": steps, "parameters": sum(p.numel() for p in run.model.parameters()),
        "losses": torch.stack(run.losses).float().tolist(),
    }  # fmt: skip


def rows(names: list[str], plan: Plan, corpus: Corpus, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, row). A published package that is not here, or does not run here, costs its own row only."""
    for name in names:
        contender = CONTENDERS[name]
        if contender.needs and importlib.util.find_spec(contender.needs) is None:
            print(f"{name}: skipped, {contender.needs} is not installed", file=sys.stderr, flush=True)
            yield name, {"missing": contender.needs}
            continue
        try:
            found = measure(contender, plan, corpus, device)
        except Exception as error:
            if contender.needs is None:
                raise
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(name, {k: v for k, v in found.items() if k != "losses"}, file=sys.stderr, flush=True)
        yield name, found


def at_one_step(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The table with `loss_at` in every row that trained, in place of its losses, and the step that all reached."""
    common = min((row["steps"] for row in table.values() if "losses" in row), default=0)
    shown = {}
    for name, row in table.items():
        shown[name] = {k: v for k, v in row.items() if k != "losses"}
        if "losses" in row:
            shown[name]["loss_at"] = round(statistics.fmean(row["losses"][max(0, common - OVER) : common]), 4)
    return {"common_step": common, "contenders": shown}


def main() -> None:
    arguments = parser(__doc__, "train_gpu.json")
    arguments.add_argument("--seconds", type=float, default=PLAN.seconds, help="of training, for each contender")
    arguments.add_argument("--only", help="contenders, by name", default=",".join(CONTENDERS))
    options = arguments.parse_args()
    device = device_of(options.rehearse)
    plan = TINY if options.rehearse else replace(PLAN, seconds=options.seconds)
    corpus = standard_library(1 << 18) if options.rehearse else standard_library()
    table: dict[str, dict[str, Any]] = {}
    about = {"machine": machine(device), "seconds": plan.seconds, "batch": plan.batch}
    for name, row in rows(options.only.split(","), plan, corpus, device):
        table[name] = row
        keep({**about, **at_one_step(table)}, options.output)


if __name__ == "__main__":
    main()
