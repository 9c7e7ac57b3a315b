"""Every shell line of every document, run in order, document by document; what needs a service has a real one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import checkpoint

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ADDRESS = "http://127.0.0.1:8321"
COMMANDS = ("make", "pip", "python", "statecodec", "statecodec-server")


def shell(document: Path) -> str:
    """All shell lines of a document."""
    return "".join(text for language, text in BLOCK.findall(document.read_text()) if language == "sh")


def needs_service(document: Path) -> bool:
    return ADDRESS in shell(document) or "statecodec-server token" in shell(document)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the documents speak of."""
    (tmp_path / "run").mkdir()
    for name, steps in (("ckpt", 3), ("ckpt2", 4), ("run/ckpt_600", 3), ("run/ckpt_650", 4)):
        checkpoint(tmp_path / f"{name}.pt", steps=steps)
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    return tmp_path


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `statecodec` is served: see warm.py."""
    path = str(tmp_path_factory.mktemp("warm") / "socket")
    command = [sys.executable, str(ROOT / "tests" / "warm.py"), path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield path
        process.kill()


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory, warm: str) -> dict[str, str]:
    """PATH with stand-ins first: see stand_in.py."""
    stand_ins = tmp_path_factory.mktemp("bin")
    for name in COMMANDS:
        script = stand_ins / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/stand_in.py {name} "$@"\n')
        script.chmod(0o755)
    path = f"{stand_ins}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "STAND_INS": str(stand_ins), "WARM": warm, "PYTHONPATH": f"{ROOT}"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, kernels: Path) -> Iterator[Any]:
    """A real service with the library behind it."""
    pytest.importorskip("fastapi", reason="the service's packages are not installed")
    from tests.server.service import Service

    with Service(tmp_path_factory.mktemp("service") / "data", backend="statecodec", kernels=kernels) as running:
        yield running


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if shell(d)], ids=lambda d: d.relative_to(ROOT).as_posix())
def test_shell_lines_run_in_order(
    document: Path, folder: Path, environment: dict[str, str], request: pytest.FixtureRequest
) -> None:
    text = shell(document)
    for tool in ("curl", "jq"):
        if f"{tool} " in text and shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if needs_service(document):
        service = request.getfixturevalue("service")
        environment |= service.environment() | {"PATH": environment["PATH"], "STATECODEC_TOKEN": service.token}
        text = text.replace(ADDRESS, service.url)
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_no_shell_line_hides_in_a_block_without_a_language() -> None:
    commands = re.compile(rf"^({'|'.join(COMMANDS)}|curl|\.) ", re.MULTILINE)
    for document in DOCUMENTS:
        for language, text in BLOCK.findall(document.read_text()):
            assert language in ("sh", "text") or not commands.search(text), (document.name, text)


@pytest.mark.parametrize(
    "line",
    ["make nonsense", "pip install 'statecodec[server]'", "pip install '.[nonsense]'", "python examples/nonsense.py",
     "statecodec worker --nonsense s3://x", "statecodec compress nonsense.pt"],
)  # fmt: skip
def test_a_wrong_line_is_found(line: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(["bash", "-euc", line], cwd=folder, env=environment, capture_output=True, timeout=60)
    assert done.returncode != 0


def test_the_site_is_built_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for path in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "Makefile", ROOT / "LICENSE"):
        shutil.copy(path, tmp_path)
    unshare = ["unshare", "-rn"] if subprocess.call(["unshare", "-rn", "true"], stderr=subprocess.DEVNULL) == 0 else []
    command = [*unshare, "make", "site", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "build" / "site").glob("*.html"))
    assert {"index.html", "start.html", "cli.html"} <= {page.name for page in pages}
    foreign = re.compile(r"""(?:src=|stylesheet" href=|@import )["']?(?:https?:)?//""")
    for page in pages:
        assert not foreign.search(page.read_text()), f"{page.name} loads something that does not come with it"
