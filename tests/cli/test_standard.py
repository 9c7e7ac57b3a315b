"""`-`: a checkpoint from standard input, an output to standard output."""

from __future__ import annotations

import hashlib
import io
import os
import pty
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from statecodec_cli.main import main
from tests.cli.run import Cli

STATECODEC = (sys.executable, "-m", "statecodec_cli")
STREAMS = ("stdin", "stdout", "stderr")


def run(*words: object, data: bytes = b"", folder: Path) -> subprocess.CompletedProcess[bytes]:
    """A real process, with pipes for its streams."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(
        [*STATECODEC, *map(str, words)], input=data, capture_output=True, env=environment, timeout=120, check=False
    )


def call(*words: object, data: bytes = b"", folder: Path) -> subprocess.CompletedProcess[bytes]:
    """The same in this process, which need not import torch again."""
    streams = {name: io.TextIOWrapper(io.BytesIO(data if name == "stdin" else b"")) for name in STREAMS}
    with ExitStack() as stack:
        for name, stream in streams.items():
            stack.enter_context(mock.patch.object(sys, name, stream))
        stack.enter_context(mock.patch.object(tempfile, "tempdir", str(folder)))
        code = main([str(word) for word in words])
        for name in ("stdout", "stderr"):
            streams[name].flush()
    out, err = (streams[name].buffer.getvalue() for name in ("stdout", "stderr"))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(words, code, out, err)


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def test_there_and_back_through_pipes(ckpt: Path, temporary: Path) -> None:
    original = ckpt.read_bytes()
    packed = run("compress", "-", "-o", "-", "--preset", "lossless", data=original, folder=temporary)
    assert packed.returncode == 0, packed.stderr
    assert b"B/param" in packed.stderr
    shown = call("inspect", "-", data=packed.stdout, folder=temporary)
    assert b"standard input" in shown.stdout
    checked = call("verify", "-", "--against", ckpt, data=packed.stdout, folder=temporary)
    assert checked.returncode == 0, checked.stderr
    restored = run("restore", "-", "-o", "-", data=packed.stdout, folder=temporary)
    assert hashlib.sha256(restored.stdout).digest() == hashlib.sha256(original).digest()
    converted = call("convert", "-", "-", "--to", "exp_avg=cast", data=packed.stdout, folder=temporary)
    assert 0 < len(converted.stdout) < len(packed.stdout)
    assert list(temporary.iterdir()) == []


def test_comparisons_and_analyses_read_standard_input(ckpt: Path, temporary: Path) -> None:
    content = ckpt.read_bytes()
    for words in (("diff", "-", ckpt), ("diff", ckpt, "-")):
        same = call(*words, "--json", data=content, folder=temporary)
        assert b'"identical": true' in same.stdout
        assert b'"standard input"' in same.stdout
    measured = call("analyze", "-", "-q", data=content, folder=temporary)
    assert measured.stdout.startswith(b"standard input ")
    both = call("diff", "-", "-", data=content, folder=temporary)
    assert (both.returncode, b"one of the checkpoints only" in both.stderr) == (2, True)
    assert list(temporary.iterdir()) == []


def test_nobody_sees_the_temporary_files(ckpt: Path, temporary: Path) -> None:
    content = ckpt.read_bytes()
    packed = call("compress", "-", "-o", "-", data=content, folder=temporary)
    calls = [
        packed,
        call("restore", "-", "-o", "-", data=packed.stdout, folder=temporary),
        call("convert", ckpt, "-", "--layout", "torch", folder=temporary),
    ]
    for done in calls:
        assert (done.returncode, b"standard output" in done.stderr) == (0, True), done.stderr
    refused = [
        call("inspect", "-", data=b"garbage", folder=temporary),
        call("restore", "-", "-o", "-", data=content, folder=temporary),
        call("verify", "-", data=packed.stdout[:-9000], folder=temporary),
        call("diff", ckpt, "-", data=b"garbage", folder=temporary),
    ]
    for done in refused:
        assert done.returncode == 1
        assert done.stderr.startswith((b"error: standard input", b"error: stdin")), done.stderr
    for done in (*calls, *refused):
        assert str(temporary).encode() not in done.stderr


def test_what_makes_no_sense_says_so(ckpt: Path, temporary: Path) -> None:
    content = ckpt.read_bytes()
    nameless = call("compress", "-", data=content, folder=temporary)
    assert (nameless.returncode, nameless.stdout) == (2, b"")
    assert b"give -o" in nameless.stderr
    both = call("compress", ckpt, "-o", "-", "--json", folder=temporary)
    assert both.returncode == 2
    assert b"not both" in both.stdout
    garbage = call("compress", "-", "-o", "-", data=b"garbage", folder=temporary)
    assert (garbage.returncode, garbage.stdout) == (1, b"")
    assert list(temporary.iterdir()) == []


def test_a_directory_does_not_go_to_standard_output(ckpt: Path, temporary: Path, cli: Cli) -> None:
    packed = ckpt.parent / "out.sc.safetensors"
    folder = ckpt.parent / "run"
    folder.mkdir()
    ckpt.rename(folder / "ckpt.pt")
    assert cli("compress", folder, "-o", packed).code == 0
    refused = call("restore", packed, "-o", "-", folder=temporary)
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert b"a directory cannot be written" in refused.stderr


@pytest.mark.parametrize("words", [("compress", "-", "-o", "x"), ("compress", "CKPT", "-o", "-")])
def test_a_terminal_is_neither_read_nor_written(ckpt: Path, words: tuple[str, ...]) -> None:
    ours, theirs = pty.openpty()
    try:
        command = [*STATECODEC, *(str(ckpt) if word == "CKPT" else word for word in words)]
        done = subprocess.run(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert b"terminal" in done.stderr
