"""`statecodec analyze`: how much each tensor can be compressed, and the rules that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from statecodec_cli import console, options, standard
from statecodec_cli.progress import reporting

Basis = Literal["type", "layer", "table"]


def run(
    src: Annotated[
        list[Path],
        options.source("Checkpoints of one run, compressed or not, or SNR tables (.csv).", "SRC..."),
    ],
    snr: Annotated[
        bool, typer.Option("--snr", help="Measure the SNR (the default unless --curve is given alone).")
    ] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="Size of the last checkpoint against step error, with the presets on it.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="RULES",
            show_default=False,
            help="Write a rules file for `compress --rules` and for SlimAdam.",
        ),
    ] = None,
    basis: Annotated[
        Basis,
        typer.Option(
            "--by",
            help="Rules by depth-averaged layer type (they transfer to other depths and widths), by single layer, or "
            "the paper's table.",
        ),
    ] = "type",
    cutoff: Annotated[
        float, typer.Option("--cutoff", metavar="SNR", help="Share only above this SNR; lower saves more.")
    ] = 1.0,
    threads: options.Threads = None,
    every: options.All = False,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how far tensors can shrink.

    The signal-to-noise ratio of every second moment over every subset of its dimensions says which of them can share
    one value (SlimAdam); several checkpoints are averaged. The curve says what each byte buys: the smallest size for
    any error of the Adam update, measured on this checkpoint.
    """
    import statecodec
    from statecodec_cli import analysis_plots, analysis_tables, plots

    plots.require(plot)
    with standard.sources(src) as paths, reporting(quiet=quiet) as progress:
        analysis = statecodec.analyze(
            *paths,
            snr=snr or not curve or output is not None,
            curve=curve,
            cutoff=cutoff,
            threads=threads,
            progress=progress,
        )
    document = analysis.to_json()
    document["sources"] = ["standard input" if str(path) == standard.DASH else str(path) for path in src]
    if output:
        analysis.save_rules(output, basis)
        console.say(f"rules by {basis} written to {output}")
    if plot:
        plots.save(analysis_plots.analysis(document), plot)
    if as_json:
        console.emit(document)
    else:
        console.show(*analysis_tables.analyzed(console.printable(document), every=every))
