"""`benchmarks/gpu.py`, which runs what needs a card, without one: its stages in small, and what travels along."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["benchmarks_gpu"] = module  # dataclasses look there
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_every_stage_runs_in_small() -> None:
    """The tests that need a card are found, kernels and steps are timed once their bits are right, GPTs are trained.

    `large` and `tune` are the script of `steps` with other arguments: `make gpu-rehearsal`.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--rehearse", "tests", "kernels", "steps", "train"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(": ok, ") == 4


def test_what_travels_along_is_found_after_all_else(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages lie unpacked in a folder; the checkout and what the machine names come before them."""
    for folder, names in {"packages": ("alone", "named", "statecodec"), "here": ("named",)}.items():
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "__init__.py").touch()
    monkeypatch.setattr(gpu, "PACKAGES", tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "here"))
    code = "import alone, named, statecodec; print(alone.__file__, named.__file__, statecodec.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=gpu.environment(False), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(path).parents[1].relative_to(tmp_path.parent) for path in done.stdout.split()[:2]] == [
        Path(tmp_path.name, "packages"), Path(tmp_path.name, "here")
    ]  # fmt: skip
    assert Path(done.stdout.split()[2]).is_relative_to(ROOT)


def test_all_stages_fit_into_one_call(gpu: ModuleType) -> None:
    """What a machine for GPUs allows a command is ten minutes at most; the whole plan stops before eight."""
    assert sum(gpu.STAGES[name].seconds for name in gpu.PLAN) <= 470
    assert set(gpu.STAGES) - set(gpu.PLAN) == {"tune"}


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    """A package of one module that asks for others."""
    module = name.replace("-", "_")
    stem = f"{module}-{version}"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {other}" for other in needs)]
    members = {
        f"{module}.py": "",
        f"{stem}.dist-info/METADATA": "\n".join(["Metadata-Version: 2.1", *metadata]),
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}.dist-info/RECORD": "",
    }
    with ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for path, text in members.items():
            archive.writestr(path, text)


def test_nothing_travels_along_that_was_not_named(tmp_path: Path) -> None:
    """torch above all, which flashoptim asks for: it is several GB, and would hide the one that is there."""
    versions = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    named = ("zstandard", "zlib-ng", "safetensors", "flashoptim")
    for name in (*named, "torch"):
        wheel(tmp_path, name, versions.get(name, "2.13.0"), *(("torch",) if name == "flashoptim" else ()))
    (tmp_path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    env = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    command = ["make", "-f", str(ROOT / "Makefile"), "gpu-packages", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    travelling = {path.stem for path in (tmp_path / ".gpu-packages").glob("*.py")}
    assert travelling == {name.replace("-", "_") for name in named}
