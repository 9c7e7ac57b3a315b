"""`statecodec restore`: a statecodec file back into the checkpoint it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statecodec_cli import console, options
from statecodec_cli.progress import reporting


def run(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", exists=True, show_default=False, help="A file that `compress` wrote.")
    ],
    output: options.Output = None,
    device: options.DeviceOption = "auto",
    times: Annotated[
        bool, typer.Option("--times", help="Give files and directories their modification times back.")
    ] = False,
    threads: options.Threads = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Restore the original checkpoint.

    It gets its own name, beside SRC, unless -o says otherwise.

    After `--preset lossless` it is the same file bit for bit. After any other preset it is the same file with other
    numbers in the tensors that were not kept exactly, and whatever loaded the original loads it.
    """
    import statecodec
    from statecodec_cli import tables

    with reporting(quiet=quiet) as progress:
        report = statecodec.restore(
            src, output, device=device, force=force, times=times, progress=progress, threads=threads
        )
    document = report.to_json()
    if as_json:
        console.emit(document)
    else:
        console.show(*tables.restored(console.printable(document)))
