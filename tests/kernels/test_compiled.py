"""Where compiled kernels are kept: in a folder that can be written, in one that can only be read, or nowhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import statecodec

USE = """
import numpy as np
from statecodec.kernels.cpu import planes
print(planes.constant(np.zeros(10_000, np.uint8)))
stats = planes._constant.stats
print("hits", sum(stats.cache_hits.values()), "misses", sum(stats.cache_misses.values()))
"""
READ_ONLY = """
import tempfile, builtins, os
def refuse(*arguments, **options):
    raise PermissionError(13, "read-only")
tempfile.TemporaryFile = refuse
real = builtins.open
builtins.open = lambda path, mode="r", *rest, **options: refuse() if "w" in mode else real(path, mode, *rest, **options)
"""


@pytest.fixture
def installation(tmp_path):
    """A copy of the library beside whose kernels nothing can be written, not even by root."""
    root = tmp_path / "site"
    source = Path(statecodec.__file__).parent
    shutil.copytree(source, root / "statecodec", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "statecodec" / "kernels" / "cpu" / "__pycache__").write_text("a file where the folder would be")
    return root


def run(code, installation, **env):
    nowhere = "/proc/nowhere"  # nobody can make a folder there
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(installation),
        "HOME": nowhere,
        "XDG_CACHE_HOME": nowhere,
    } | env
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=installation,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_read_only_installation_without_a_home_works(installation, tmp_path):
    code = f"""
import torch, statecodec
torch.save({{"w": torch.randn(64, 64)}}, {str(tmp_path / "ckpt.pt")!r})
statecodec.compress({str(tmp_path / "ckpt.pt")!r}, preset="lossless")
print(statecodec.__file__)
"""
    assert str(installation) in run(code, installation)


def test_a_folder_that_can_only_be_read_serves_what_it_holds(installation, tmp_path):
    cache = tmp_path / "cache"
    assert "misses 1" in run(USE, installation, NUMBA_CACHE_DIR=str(cache))
    kept = sorted(cache.rglob("*"))
    assert [path for path in kept if path.suffix == ".nbc"]
    assert "hits 1 misses 0" in run(READ_ONLY + USE, installation, NUMBA_CACHE_DIR=str(cache))
    for path in cache.rglob("*.nb?"):
        path.unlink()
    assert "hits 0 misses 1" in run(READ_ONLY + USE, installation, NUMBA_CACHE_DIR=str(cache))  # compiled, not kept
    assert not list(cache.rglob("*.nb?"))
