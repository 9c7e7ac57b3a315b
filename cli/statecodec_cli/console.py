"""Printing: data to standard output, messages to standard error; control characters are escaped."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

from statecodec.figures import asked, error, figures, percent, ratio, seconds, size, step_errors, worst_weight

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = [
    "asked", "emit", "error", "fail", "figures", "percent", "printable", "ratio", "say", "seconds", "show", "size",
    "stderr", "step_errors", "worst_weight",
]  # fmt: skip

_SPACE = re.compile("(?<! ) (?! )")  # where text may be wrapped
_UNBOUNDED = 100_000  # columns of a pipe or a file, where nothing is folded or left out


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else _UNBOUNDED
    return Console(file=stream, width=width, highlight=False, emoji=False)


def stderr() -> Console:
    """A console on standard error."""
    return _console(sys.stderr)


def printable(value: Any) -> Any:
    """A JSON document (or text) whose control characters are escaped: names in a file must not steer a terminal."""
    if isinstance(value, str):
        return (
            value
            if value.isprintable()
            else "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in value)
        )
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(item) for item in value]
    return value


def show(*renderables: RenderableType, to: TextIO | None = None) -> None:
    """Print to standard output, or to another stream. Text is wrapped between words only: a path stays whole."""
    out = _console(to or sys.stdout)
    for renderable in renderables:
        _print(out, renderable)


def say(message: str) -> None:
    """Print one message to standard error, as it is (no markup)."""
    from rich.text import Text

    _print(stderr(), Text(printable(message)))


def _print(out: Console, renderable: RenderableType) -> None:
    from rich.text import Text

    from statecodec_cli.grid import TextRow

    if not isinstance(renderable, Text) or renderable.plain.startswith(" "):  # a table, or code
        out.print(renderable, overflow="ignore", crop=False)
        return
    for line in renderable.split("\n", allow_blank=True):
        spaces = [match.start() for match in _SPACE.finditer(line.plain)]
        first, *rest = line.divide(spaces)
        out.print(TextRow(first, *(word[1:] for word in rest), gap=1), overflow="ignore", crop=False)


def emit(document: Any) -> None:
    """Print a document as JSON to standard output. NaN and infinities, which JSON lacks, become strings."""
    json.dump(_finite(document), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def fail(code: str, message: str, *, as_json: bool) -> None:
    """Report an error: one red line on standard error, and with `--json` also a document on standard output."""
    if as_json:
        emit({"error": {"code": code, "message": message}})
    from rich.text import Text

    line = Text.assemble(("error: ", "bold red"), printable(message), (f"  [{code}]", "dim"))
    _print(stderr(), line)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
