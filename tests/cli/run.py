"""Running the command line: in this process for speed, or as a real one for signals and streams."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from statecodec_cli.main import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"bare {name} in JSON"))


class Cli:
    """Call it with the words of a command line."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Done:
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        captured = self._capsys.readouterr()
        return Done(code, captured.out, captured.err)


def process(*words: object, **kwargs: Any) -> subprocess.Popen[str]:
    """A real `statecodec` process with its streams in pipes."""
    command = [sys.executable, "-m", "statecodec_cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def finished(*words: object, **kwargs: Any) -> Done:
    child = process(*words, **kwargs)
    out, err = child.communicate(timeout=120)
    return Done(child.returncode, out, err)


def checkpoint(path: Path, *, width: int = 96, steps: int = 3) -> Path:
    """A small AdamW checkpoint that a few real steps made."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, width)).square().mean().backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": steps}, path)
    return path
