"""`statecodec restore`: a statecodec file back into the checkpoint it was made from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from statecodec_cli import console, options, standard
from statecodec_cli.progress import reporting


def run(
    src: Annotated[Path, options.source("A file that `compress` wrote.")],
    output: options.OutputOrStream = None,
    device: options.DeviceOption = "auto",
    times: Annotated[
        bool, typer.Option("--times", help="Give files and directories their modification times back.")
    ] = False,
    threads: options.Threads = None,
    safe_only: options.SafeOnly = False,
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

    with (
        standard.source(src) as source,
        standard.output(output, src=src, as_json=as_json) as target,
        reporting(quiet=quiet) as progress,
    ):
        report = statecodec.restore(
            source,
            target,
            device=device,
            force=force,
            times=times,
            safe_only=safe_only,
            progress=progress,
            threads=threads,
        )
    document = standard.written(output, report.to_json())
    if as_json:
        console.emit(document)
    else:
        shown = tables.restored(console.printable(document))
        console.show(*shown, to=sys.stderr if output == standard.DASH else None)
