"""Running averages of weights: what they take exactly, on the grid of their weights, and as a distance from these.

A GPT is trained with averages of several decays beside it, by torch's AveragedModel, and saved three times with one of
them each. Bits are those of packed codes, of weights and averages of 4096 elements and more. The held-out loss of the
average is that before and after.

    python benchmarks/averages.py        -> benchmarks/results/averages.json
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import frameworks
import torch
from common import CACHE, record
from tasks import text
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import statecodec
from statecodec.checkpoint.report import Report
from statecodec.choose import derived

DECAYS, SAVED, PRESETS = (0.99, 0.999, 0.9999), (60, 200, 600), ("resume", "small", "tiny")


def main() -> None:
    """Measure every preset on every checkpoint."""
    torch.set_num_threads(1)
    CACHE.mkdir(exist_ok=True)
    path = CACHE / "averages.pt"
    rows = [
        {"steps": steps, "decay": decay, "preset": preset, **measured(path, preset)}
        for steps, decay in checkpoints(path)
        for preset in PRESETS
    ]
    record("averages", {"rows": rows})


def checkpoints(path: Path) -> Iterator[tuple[int, float]]:
    """A run, saved after some steps with each of its averages."""
    net = frameworks.model()
    optimizer = frameworks.adamw(net)
    averages = {decay: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay)) for decay in DECAYS}
    taken = frameworks.stepping(optimizer)

    def stepped(loss: Tensor) -> None:
        taken(loss)
        for average in averages.values():
            average.update_parameters(net)

    for start, stop in zip((0, *SAVED), SAVED, strict=False):
        frameworks.losses(net, stepped, start, stop)
        for decay, average in averages.items():
            saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "ema": average.state_dict()}
            torch.save(saved, path)
            yield stop, decay


def measured(path: Path, preset: str) -> dict[str, Any]:
    """Bits and ratios of three ways to store the average, and its loss minus that of the exact one."""
    packed = path.with_suffix(".sc.safetensors")
    exact = statecodec.compress(path, packed, preset=preset, rules=["ema=raw"], force=True)
    with mock.patch.object(derived, "followed", return_value={}):
        alone = statecodec.compress(path, packed, preset=preset, force=True)
    beside = statecodec.compress(path, packed, preset=preset, force=True)
    before, after = (saved["ema"] for saved in (torch.load(path, weights_only=True), statecodec.load(packed)))
    ways = {"exact": exact, "alone": alone, "beside": beside}
    return {
        "weight": bits(exact, "weight"),
        "average": {way: bits(report, "ema") for way, report in ways.items()},
        "ratio": {way: report.ratio for way, report in ways.items()},
        "loss": held_out(before), "loss gap": held_out(after) - held_out(before),
    }  # fmt: skip


def bits(report: Report, role: str) -> float:
    """Of an element of that role."""
    large = [t for t in report.tensors if t.role == role and t.bytes_before >= 4 * 4096]
    return 32 * sum(t.bytes_after for t in large) / sum(t.bytes_before for t in large)


@torch.no_grad()
def held_out(average: dict[str, Tensor]) -> float:
    """The loss of an average."""
    net = frameworks.model()
    net.load_state_dict({k.removeprefix("module."): t for k, t in average.items() if k != "n_averaged"})
    tokens, targets = text(64, None, 0)
    return nn.functional.cross_entropy(net(tokens).flatten(0, 1), targets.flatten()).item()


if __name__ == "__main__":
    main()
