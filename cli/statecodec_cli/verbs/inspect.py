"""`statecodec inspect`: what is in a checkpoint, without running any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from statecodec_cli import console, options, standard


def run(
    src: Annotated[Path, options.source("Any checkpoint, compressed or not.")],
    safe_only: options.SafeOnly = False,
    every: options.All = False,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,  # as every verb on checkpoints; nothing here takes long enough for progress
) -> None:
    """Show what is in a checkpoint.

    Tensors, their roles, codecs, sizes and recorded errors, of any checkpoint, compressed or not.

    Nothing in the file is executed: torch files are read without unpickling them.
    """
    import statecodec
    from statecodec_cli import plots, tables

    plots.require(plot)
    with standard.source(src) as source:
        document = standard.named(src, statecodec.inspect(source, safe_only=safe_only).to_json())
    if plot:
        plots.save(plots.report(document), plot)
    if as_json:
        console.emit(document)
    else:
        console.show(*tables.inspected(console.printable(document), every=every))
