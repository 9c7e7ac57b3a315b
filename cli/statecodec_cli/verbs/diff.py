"""`statecodec diff`: how far two checkpoints are apart, and what that does to the next Adam update."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from statecodec_cli import console, options, standard
from statecodec_cli.progress import reporting


def run(
    a: Annotated[Path, options.source("The reference, compressed or not; - for standard input.", "A")],
    b: Annotated[Path, options.source("What is compared with it.", "B")],
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
    with standard.sources([a, b]) as (first, second), reporting(quiet=quiet) as progress:
        document = statecodec.diff(first, second, progress=progress).to_json()
    document |= {name: "standard input" for name, path in (("a", a), ("b", b)) if str(path) == standard.DASH}
    if plot:
        plots.save(plots.difference(document), plot)
    if as_json:
        console.emit(document)
    else:
        console.show(*tables.difference(console.printable(document), every=every))
