"""`statecodec diff`: how far two checkpoints are apart, and what that does to the next Adam update."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statecodec_cli import console, options
from statecodec_cli.progress import reporting


def run(
    a: Annotated[
        Path, typer.Argument(metavar="A", exists=True, show_default=False, help="The reference, compressed or not.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", exists=True, show_default=False, help="What is compared with it.")],
    every: options.All = False,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare two checkpoints.

    The error of weights and moments, and of the Adam update they lead to.

    The update is u = m_hat / (sqrt(v_hat) + eps). Its relative rms error and its largest value say whether resuming is
    safe: a small error in the second moment can be a huge one in the update.
    """
    import statecodec
    from statecodec_cli import plots, tables

    plots.require(plot)
    with reporting(quiet=quiet) as progress:
        document = statecodec.diff(a, b, progress=progress).to_json()
    if plot:
        plots.save(plots.difference(document), plot)
    if as_json:
        console.emit(document)
    else:
        console.show(*tables.difference(console.printable(document), every=every))
