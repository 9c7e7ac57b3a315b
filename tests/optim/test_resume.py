"""Save after k steps, load in a new process, continue: the bits of never having stopped, for every optimizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.optim.helpers import EVERY, bits, parameters, run

CONTINUE = """
import sys, torch
from pathlib import Path
from tests.optim.helpers import EVERY, run
for path in sorted(Path(sys.argv[1]).glob("*.saved")):
    saved = torch.load(path, weights_only=True)
    params = {k: torch.nn.Parameter(v) for k, v in saved["model"].items()}
    optimizer = EVERY[path.stem.split("@")[0]](params.items())
    optimizer.load_state_dict(saved["optimizer"])
    run(optimizer, params, range(4, 8))
    torch.save({"model": dict(params), "optimizer": optimizer.state_dict()}, path.with_suffix(".resumed"))
"""


def model(params: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {k: p.detach() for k, p in params.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resuming_in_a_new_process_is_bit_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = {}
    fp16 = dtype == torch.float16
    names = [n for n in EVERY if not (fp16 and n in ("adamw-stochastic", "adamw-plain16"))]  # bf16 only
    for name in names:
        params = parameters(dtype)
        optimizer = EVERY[name](params.items())
        run(optimizer, params, range(4))
        torch.save({"model": model(params), "optimizer": optimizer.state_dict()}, tmp_path / f"{name}@.saved")
        run(optimizer, params, range(4, 8))
        whole[name] = bits({"model": model(params), "optimizer": optimizer.state_dict()})
    subprocess.run([sys.executable, "-c", CONTINUE, str(tmp_path)], check=True, timeout=200)
    for name in names:
        resumed = torch.load(tmp_path / f"{name}@.resumed", weights_only=True)
        resumed["model"] = {k: v.detach() for k, v in resumed["model"].items()}
        assert bits(resumed) == whole[name], name
