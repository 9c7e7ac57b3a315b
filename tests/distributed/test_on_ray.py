"""Compression on a Ray cluster of emulated nodes: a worker and a node are killed; the bytes of a single process."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import statecodec


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_killed_worker_and_a_killed_node_change_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.randn(256, 512), "exp_avg_sq": torch.rand(256, 512)}
        for i in range(30)
    }
    source = tmp_path / "ckpt.pt"
    torch.save({"optimizer": {"state": state, "param_groups": [{"params": list(range(30)), "lr": 1e-3}]}}, source)
    statecodec.compress(source, tmp_path / "whole.sc.safetensors")
    (tmp_path / "out").mkdir()
    script = Path(__file__).with_name("ray_cluster.py")
    call = [sys.executable, str(script), str(source), str(tmp_path / "out" / "whole.sc.safetensors"), "12"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["killed"] == ["worker", "node"], "while there was work left"
    assert result["progress"] >= 3
    assert "weight" in result["error"], "errors of a task are those of the library"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole.sc.safetensors"]
    assert Path(result["path"]).read_bytes() == (tmp_path / "whole.sc.safetensors").read_bytes()
