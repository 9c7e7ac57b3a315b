"""The options that several verbs share, declared once so that they read and behave alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Source = Annotated[Path, typer.Argument(metavar="SRC", exists=True, show_default=False)]
Output = Annotated[
    str | None,  # no Path, which would lose a slash at the end
    typer.Option(
        "--output",
        "-o",
        metavar="DST",
        show_default=False,
        help="Where to write: a file, or a folder. Default: beside SRC.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse rules that match no tensor, instead of noting them.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
PRESETS = "lossless, resume, small, tiny or weights; `statecodec codecs` explains them."
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
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the numbers are crunched.")]
