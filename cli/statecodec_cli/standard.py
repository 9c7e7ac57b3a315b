"""`-` on the command line: a checkpoint from standard input, an output to standard output.

A checkpoint cannot be read from a pipe in one pass, nor is an output shown before it is whole: both go through a file
in the folder for temporary files (TMPDIR).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

DASH = "-"
_INPUT, _OUTPUT = "standard input", "standard output"
_PIECE = 1 << 20  # bytes copied at a time


@contextmanager
def source(path: Path) -> Iterator[Path]:
    """The path itself, or what is read from standard input, as a file for as long as the block runs.

    Raises UsageError if standard input is a terminal.
    """
    if str(path) != DASH:
        yield path
        return
    from statecodec.errors import UsageError

    if sys.stdin.isatty():
        raise UsageError("- reads a checkpoint from standard input, which is a terminal here: pipe a file into it")
    with tempfile.TemporaryDirectory(prefix="statecodec-") as folder:
        spooled = Path(folder) / "stdin"
        with spooled.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, _PIECE)
        with _called(spooled, _INPUT):
            yield spooled


@contextmanager
def sources(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Several paths, of which one may be standard input. Raises UsageError."""
    from statecodec.errors import UsageError

    if sum(str(path) == DASH for path in paths) > 1:
        raise UsageError("standard input (-) can be one of the checkpoints only")
    with ExitStack() as stack:
        yield [stack.enter_context(source(path)) for path in paths]


@contextmanager
def _called(file: Path, name: str) -> Iterator[None]:
    """Errors name the stream that the user knows, not the temporary file."""
    from statecodec.errors import StatecodecError

    try:
        yield
    except StatecodecError as error:
        error.args = (str(error).replace(str(file), name),)
        raise


def named(src: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The report of a source, under the name that the user knows."""
    return {**document, "path": _INPUT} if str(src) == DASH else document


def written(output: str | None, document: dict[str, Any]) -> dict[str, Any]:
    """The report of an output, under the name that the user knows."""
    return {**document, "path": _OUTPUT} if output == DASH else document


@contextmanager
def output(name: str | None, *, src: Path, as_json: bool) -> Iterator[str | None]:
    """The name itself, or a file that goes to standard output when the block is done.

    Raises UsageError: for a terminal, beside --json, for a directory, or if nothing says where to write.
    """
    from statecodec.errors import UsageError

    if name is None and str(src) == DASH:
        raise UsageError("what comes from standard input has no name to derive the output's from: give -o")
    if name != DASH:
        yield name
        return
    if as_json:
        raise UsageError("standard output takes the file (-o -) or the report (--json), not both")
    if sys.stdout.isatty():
        raise UsageError("-o - writes a binary file to standard output, which is a terminal here: redirect it")
    with tempfile.TemporaryDirectory(prefix="statecodec-") as folder:
        result = Path(folder) / "stdout"
        with _called(result, _OUTPUT):
            yield str(result)
        if result.is_dir():
            raise UsageError("a directory cannot be written to standard output: give -o a name")
        with result.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer, _PIECE)
        sys.stdout.buffer.flush()
