"""`statecodec verify`: whether a compressed file is intact, and whether it is a compression of a given original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statecodec_cli import console, options, standard
from statecodec_cli.progress import reporting


def run(
    src: Annotated[Path, options.source("A file that `compress` wrote.")],
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="ORIGINAL",
            exists=True,
            show_default=False,
            help="Also decode, and hold every number to the error that the file states.",
        ),
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that a compressed file is intact.

    Every checksum; with --against ORIGINAL also every number. Exit code 1 if anything is wrong.
    """
    import statecodec
    from statecodec_cli import tables

    with standard.source(src) as source, reporting(quiet=quiet) as progress:
        document = standard.named(src, statecodec.verify(source, against, progress=progress).to_json())
    if as_json:
        console.emit(document)
    else:
        console.show(*tables.verified(console.printable(document), against=against is not None))
