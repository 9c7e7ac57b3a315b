"""A wheel built from this checkout, installed into an environment of its own, works there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cli.run import ROOT, checkpoint


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (found,) = folder.glob("statecodec-*.whl")
    return found


def test_the_wheel_holds_the_four_packages_the_page_and_the_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {"statecodec", "statecodec_cli", "statecodec_client", "statecodec_server"} <= tops
    assert len(tops) == 5  # and the metadata
    assert "statecodec_server/static/index.html" in names
    assert "statecodec/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or "/test" in name]


def test_the_installed_command_compresses_and_restores(wheel: Path, tmp_path: Path) -> None:
    """The environment has our own package from the wheel and borrows the others: `make wheel` installs all of them."""
    home = tmp_path / "home"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "zz-borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    install = ("--python", python, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
    run(sys.executable, "-m", "pip", *install, cwd=tmp_path)
    where = run(python, "-c", "import statecodec, statecodec_cli; print(statecodec.__file__)", cwd=tmp_path)
    assert where.startswith(str(home))

    checkpoint(tmp_path / "ckpt.pt")
    before = (tmp_path / "ckpt.pt").read_bytes()
    run(home / "bin" / "statecodec", "compress", "ckpt.pt", "--preset", "lossless", "--quiet", cwd=tmp_path)
    run(home / "bin" / "statecodec", "restore", "ckpt.sc.safetensors", "-o", "again.pt", "--quiet", cwd=tmp_path)
    assert (tmp_path / "again.pt").read_bytes() == before
