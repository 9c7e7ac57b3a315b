"""torchtitan's Trainer, set up by examples/torchtitan_train.py: trained on 2 ranks, killed, resumed on 3 and 1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchtitan", reason="torchtitan is not installed; `make torchtitan` runs this")

ROOT = Path(__file__).parents[2]
STEPS, DIES_AT = 6, 4


def trained(ranks: int, folder: Path, dies_at: int = 0) -> dict[int, float]:
    """The losses of the steps that were made, by step."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", ROOT / "tests" / "frameworks" / "titan_on_cpu.py",
               folder, str(STEPS), str(dies_at)]  # fmt: skip
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=folder.parent)
    if dies_at:
        assert done.returncode, "a rank was killed"
        return {}
    assert done.returncode == 0, done.stderr[-4000:]
    return {int(step): loss for step, loss in json.loads((folder / "losses.json").read_text()).items()}


def test_a_killed_run_goes_on_with_other_numbers_of_ranks(tmp_path: Path) -> None:
    straight = trained(2, tmp_path / "straight")
    assert list(straight) == list(range(1, STEPS + 1))
    assert straight[STEPS] < straight[1]
    trained(2, tmp_path / "killed", DIES_AT)
    files = {p.suffixes[-1] for p in (tmp_path / "straight" / "checkpoint" / f"step-{STEPS}").iterdir()}
    assert files == {".json", ".safetensors"}, "compressed, no pickle"
    for ranks in (3, 1):
        folder = shutil.copytree(tmp_path / "killed", tmp_path / str(ranks))
        losses = trained(ranks, folder)
        assert list(losses) == list(range(DIES_AT - 1, STEPS + 1)), "from the last whole checkpoint on"
        assert losses == pytest.approx({s: straight[s] for s in losses}, rel=1e-3), "sums in another order, and resume"
