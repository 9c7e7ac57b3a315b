"""The options that several verbs share, declared once so that they read and behave alike."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from statecodec.operations import PRESETS

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_NO_URL = (
    "URLs are not opened: give a file, a directory, or - for standard input (`curl -fsS URL | statecodec inspect -`)."
)


def _existing(text: str) -> Path:
    """A path that is there, under its own name or as the files that its index lists, or - for standard input."""
    if text != "-" and not Path(text).exists() and not Path(f"{text}.index.json").exists():
        more = f" {_NO_URL}" if _URL.match(text) else ""
        raise typer.BadParameter(f"path {text!r} does not exist.{more}")
    return Path(text)


def source(explanation: str, name: str = "SRC") -> Any:
    """An argument that is a checkpoint, or several."""
    return typer.Argument(metavar=name, parser=_existing, show_default=False, help=explanation)


def _fraction(text: str) -> float:
    """A fraction of an optimizer step: 0.01 or 1%."""
    number = text.strip()
    try:
        value = float(Decimal(number[:-1].rstrip()).scaleb(-2) if number.endswith("%") else Decimal(number))
    except (ArithmeticError, ValueError):
        value = 0.0
    if not 0 < value <= 1:
        raise typer.BadParameter(
            f"{text!r} is not a fraction of an optimizer step above 0 and up to 1, such as 0.01 or 1%"
        )
    return value


def fraction(name: str, explanation: str) -> Any:
    """An option that is a fraction of an optimizer step."""
    return typer.Option(name, metavar="F", parser=_fraction, show_default=False, help=explanation)


def _output(places: str) -> Any:
    return typer.Option(
        "--output", "-o", metavar="DST", show_default=False, help=f"Where to write: {places}. Default: beside SRC."
    )


# Text and no Path, which would lose a slash at the end.
Output = Annotated[str | None, _output("a file, or a folder")]
OutputOrStream = Annotated[str | None, _output("a file, a folder, or - for standard output")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse rules that match no tensor, instead of noting them.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
SafeOnly = Annotated[
    bool, typer.Option("--safe-only", help="Refuse a checkpoint whose unpickling could run code; inspect shows what.")
]
PRESET_NAMES = f"{', '.join(list(PRESETS)[:-1])} or {list(PRESETS)[-1]}; `statecodec codecs` explains them."
AsJson = Annotated[bool, typer.Option("--json", help="Print the result (or the error) as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
All = Annotated[bool, typer.Option("--all", "-a", help="List every tensor instead of a summary by role and codec.")]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", show_default=False, help="Draw it into FILE (.svg or .png), replacing it."),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, show_default=False, help="Worker threads. Default: one per core."),
]
Device = Literal["auto", "cpu", "cuda"]
DeviceOption = Annotated[
    Device,
    typer.Option("--device", help="Where values are encoded or decoded; auto is explained in docs/kernels.md."),
]
