"""Writes the golden chain, once: `python -m tests.analysis.make_golden` refuses to replace it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch

import statecodec

GOLDEN = Path(__file__).parent / "golden"


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def main() -> None:
    GOLDEN.mkdir()
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(48, 100, generator=generator) / 8
    moment = torch.rand(48, 100, generator=generator) ** 2
    expected: dict[str, dict[str, object]] = {}
    previous = None
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3):
            path = Path(folder) / "c.pt"
            state = {0: {"step": torch.tensor(float(i + 1)), "exp_avg": weight / 9, "exp_avg_sq": moment}}
            group = {"params": [0], "param_names": ["w"], "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
            torch.save({"model": {"w": weight}, "optimizer": {"state": state, "param_groups": [group]}}, path)
            target = GOLDEN / f"link{i}.sc.safetensors"
            rules = ["weight=residual(inner=companded(curve=linear))"] if i == 2 else []
            statecodec.compress(path, target, base=previous, rules=rules, sha256=False)
            previous = target
            with statecodec.open(target) as f:
                tensors = {name: tensor_digest(f.read(name)) for name in f.names()}
            expected[target.name] = {"sha256": hashlib.sha256(target.read_bytes()).hexdigest(), "tensors": tensors}
            weight = weight + 1e-4 * torch.randn(48, 100, generator=generator)
            moment = moment * 0.999
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
