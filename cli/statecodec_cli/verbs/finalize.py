"""`statecodec finalize`: the shares that `compress --shard` made into one compressed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statecodec_cli import console, options
from statecodec_cli.progress import reporting


def run(
    src: Annotated[Path, options.source("The checkpoint file or directory that the shares are of.")],
    output: options.Output = None,
    threads: options.Threads = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the result back and check it.")] = False,
    force: options.Force = False,
    every: options.All = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Join the shares of a compression.

    The result has the same bytes as that of a single `compress`. The settings are those that the shares were made with;
    SRC and -o are given as they were there. The shares are removed once the file is there.
    """
    import statecodec
    from statecodec_cli import tables

    with reporting(quiet=quiet) as progress:
        report = statecodec.finalize(src, output, verify=verify, force=force, threads=threads, progress=progress)
    document = report.to_json()
    if as_json:
        console.emit(document)
    else:
        console.show(*tables.compressed(console.printable(document), every=every))
