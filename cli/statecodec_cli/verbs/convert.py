"""`statecodec convert`: from one codec to another, and from one optimizer to another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from statecodec_cli import console, options, standard
from statecodec_cli.progress import reporting


def run(
    src: Annotated[Path, options.source("A checkpoint, compressed or not.")],
    dst: Annotated[
        str, typer.Argument(metavar="DST", show_default=False, help="Where to write; - for standard output.")
    ],
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="PATTERN=CODEC or OPTIMIZER",
            show_default=False,
            help="A rule, such as 'exp_avg_sq=shared(dims=[1])' (repeatable), or one of torch, adamw, foam, slimadam, "
            "lorapre with options, such as 'foam(level=2)'.",
        ),
    ],
    strict: options.Strict = False,
    pack: Annotated[
        str, typer.Option("--pack", metavar="none|zstd[:LEVEL]", help="Entropy packing of what packs.")
    ] = "zstd",
    threads: options.Threads = None,
    safe_only: options.SafeOnly = False,
    force: options.Force = False,
    every: options.All = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Change codecs, or the optimizer.

    With rules, the tensors they name get that codec and all others stay as they are; DST is a compressed file. With an
    optimizer, its state becomes one that this class of statecodec.optim resumes from, `torch` leads back to
    torch.optim; DST is a torch file, or a compressed one if it ends in .safetensors.
    """
    import statecodec
    from statecodec_cli import analysis_tables

    with (
        standard.source(src) as source,
        standard.output(dst, src=src, as_json=as_json) as target,
        reporting(quiet=quiet) as progress,
    ):
        report = statecodec.convert(
            source,
            target or dst,
            tuple(to),
            pack=pack,
            strict=strict,
            force=force,
            safe_only=safe_only,
            threads=threads,
            progress=progress,
        )
    document = report.to_json()
    if as_json:
        console.emit(document)
    else:
        shown = analysis_tables.converted(console.printable(document), every=every)
        console.show(*shown, to=sys.stderr if dst == standard.DASH else None)
