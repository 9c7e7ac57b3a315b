"""`statecodec inspect`: what is in a checkpoint, without running any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statecodec_cli import console, options


def run(
    src: Annotated[
        Path,
        typer.Argument(metavar="SRC", exists=True, show_default=False, help="Any checkpoint, compressed or not."),
    ],
    every: options.All = False,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what is in a checkpoint.

    Tensors, their roles, codecs, sizes and recorded errors, of any checkpoint, compressed or not.

    Nothing in the file is executed: torch files are read without unpickling them.
    """
    import statecodec
    from statecodec_cli import plots, tables

    plots.require(plot)
    document = statecodec.inspect(src).to_json()
    if plot:
        plots.save(plots.report(document), plot)
    if as_json:
        console.emit(document)
    else:
        console.show(*tables.inspected(console.printable(document), every=every))
