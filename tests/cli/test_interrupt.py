"""Ctrl-C and SIGTERM in the middle of real work: the exit code, and an untouched folder."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import statecodec
from statecodec_cli.main import _terminable
from tests.cli.run import finished, process


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose compression takes long enough to be interrupted."""
    path = tmp_path_factory.mktemp("big") / "ckpt.pt"
    torch.save({"model": {f"w{i}": torch.randn(4096, 4096) for i in range(4)}}, path)
    return path


def interrupt_when_writing(
    verb: str, source: Path, output: Path, number: signal.Signals, *options: str
) -> tuple[int, str]:
    """Start the verb, send the signal once something appears beside `output`, and return the exit code and stderr."""
    before = set(output.parent.iterdir())
    child = process(verb, source, "-o", output, "--threads", "1", *options)
    deadline = time.monotonic() + 60
    while set(output.parent.iterdir()) == before and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    return child.returncode, err


def test_an_interruption_while_importing_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    done = finished(
        "codecs", env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    )
    assert (done.code, done.out, done.err) == (130, "", "")


def frame(file: str, name: str, back: SimpleNamespace | None = None) -> SimpleNamespace:
    return SimpleNamespace(f_code=SimpleNamespace(co_filename=file, co_name=name), f_back=back)


IMPORTING = frame("<frozen importlib._bootstrap>", "_find_and_load")
CASES = {
    "import system": IMPORTING,
    "module that is imported": frame("<frozen abc>", "register", IMPORTING),
    "finalizer": frame("ffi.py", "close", frame("ffi.py", "__del__")),
}


@pytest.mark.parametrize("inside", CASES.values(), ids=CASES)
def test_an_interruption_where_exceptions_are_ignored_comes_again(inside: SimpleNamespace) -> None:
    """The handler does not raise there, but where the signal finds the program next."""
    with _terminable() as received:
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, inside)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
    assert received == [signal.SIGTERM] * 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_compress_leaves_nothing(big: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    slowly = ("--pack", "zstd:12")
    returned, err = interrupt_when_writing("compress", big, tmp_path / "out.sc.safetensors", number, *slowly)
    assert returned == code, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_restore_leaves_nothing(big: Path, tmp_path: Path) -> None:
    packed = tmp_path / "in" / "packed.sc.safetensors"
    packed.parent.mkdir()
    statecodec.compress(big, packed)
    output = tmp_path / "out" / "ckpt.pt"
    output.parent.mkdir()
    code, err = interrupt_when_writing("restore", packed, output, signal.SIGINT)
    assert code == 130, err
    assert list(output.parent.iterdir()) == []
