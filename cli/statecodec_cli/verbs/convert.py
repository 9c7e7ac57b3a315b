"""`statecodec convert`: from one codec to another, from one optimizer to another, from one layout to another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from statecodec.errors import UsageError
from statecodec.operations import LAYOUTS
from statecodec_cli import console, options, standard
from statecodec_cli.progress import reporting


def run(
    src: Annotated[Path, options.source("A checkpoint, compressed or not.")],
    dst: Annotated[
        str, typer.Argument(metavar="DST", show_default=False, help="Where to write; - for standard output.")
    ],
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="PATTERN=CODEC or OPTIMIZER",
            show_default=False,
            help="A rule, such as 'exp_avg_sq=shared(dims=[1])' (repeatable), or one of torch, adamw, foam, slimadam, "
            "lorapre with options, such as 'foam(level=2)'.",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="|".join(LAYOUTS), help="Instead: the files to put the same values into."),
    ] = None,
    strict: options.Strict = False,
    pack: Annotated[
        str,
        typer.Option(
            "--pack",
            metavar="auto|none|zstd|predicted",
            help="Entropy packing. predicted is smaller and takes longer, auto is that for 16-bit moments and momenta. "
            "zstd:LEVEL sets its level.",
        ),
    ] = "auto",
    threads: options.Threads = None,
    safe_only: options.SafeOnly = False,
    force: options.Force = False,
    every: options.All = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Change codecs, the optimizer, or the layout.

    With rules, the tensors they name get that codec and all others stay as they are; DST is a compressed file. With an
    optimizer, its state becomes one that this class of statecodec.optim resumes from, `torch` leads back to
    torch.optim; DST is a torch file, or a compressed one if it ends in .safetensors.

    With --layout the same values go into one torch.save file (torch), into a safetensors file of all tensors with a
    JSON file of all other values beside it (safetensors), or into a folder of torch.distributed.checkpoint (dcp). Of a
    DeepSpeed ZeRO directory zero-fp32 writes the fp32 parameters by name, as its zero_to_fp32.py does.
    """
    import statecodec
    from statecodec_cli import analysis_tables

    if dst == standard.DASH and layout not in (None, "torch", "zero-fp32"):
        raise UsageError(f"--layout {layout} writes more than one file; name one instead of -")

    with (
        standard.source(src) as source,
        standard.output(dst, src=src, as_json=as_json) as target,
        reporting(quiet=quiet) as progress,
    ):
        report = statecodec.convert(
            source,
            target or dst,
            tuple(to or ()),
            layout=layout,
            pack=pack,
            strict=strict,
            force=force,
            safe_only=safe_only,
            threads=threads,
            progress=progress,
        )
    document = standard.written(dst, report.to_json())
    if as_json:
        console.emit(document)
    else:
        shown = analysis_tables.converted(console.printable(document), every=every)
        console.show(*shown, to=sys.stderr if dst == standard.DASH else None)
