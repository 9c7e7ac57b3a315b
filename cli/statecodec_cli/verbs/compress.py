"""`statecodec compress`: a checkpoint file or directory into a statecodec file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from statecodec_cli import console, options, standard
from statecodec_cli.progress import reporting

Preset = Literal["lossless", "resume", "small", "tiny", "live", "weights"]


def run(
    src: Annotated[Path, options.source("A checkpoint file or directory; - for standard input.")],
    output: options.OutputOrStream = None,
    preset: Annotated[Preset, typer.Option("--preset", "-p", metavar="PRESET", help=options.PRESET_NAMES)] = "resume",
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            metavar="PATTERN=CODEC",
            show_default=False,
            help="Before the preset's own rules; the first match wins. Repeatable.",
        ),
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(
            "--rules", metavar="FILE", exists=True, dir_okay=False, show_default=False, help="A JSON file of rules."
        ),
    ] = None,
    strict: options.Strict = False,
    max_step_error: Annotated[
        float | None,
        options.fraction(
            "--max-step-error", "The error of weights and moments, as a fraction of one optimizer step: 0.01 or 1%."
        ),
    ] = None,
    max_update_error: Annotated[
        float | None, options.fraction("--max-update-error", "The same for the moments alone.")
    ] = None,
    max_weight_error: Annotated[
        float | None, options.fraction("--max-weight-error", "The same for the weights alone.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="PREVIOUS",
            exists=True,
            dir_okay=False,
            show_default=False,
            help="Store what changed since this compressed checkpoint, which must stay beside DST.",
        ),
    ] = None,
    pack: Annotated[
        str,
        typer.Option(
            "--pack",
            metavar="auto|none|zstd|predicted",
            help="Entropy packing. predicted is smaller and takes longer, auto is that for 16-bit moments and momenta. "
            "zstd:LEVEL sets its level.",
        ),
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Split the output into files of at most this size.")
    ] = "5GB",
    sha256: Annotated[
        bool | None,
        typer.Option(
            "--sha256/--no-sha256",
            show_default=False,
            help="Store the SHA-256 of the original. Default: where everything is stored exactly (lossless).",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            show_default=False,
            help="Do the I-th of N shares of the work; `statecodec finalize` joins them.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            show_default=False,
            help="Do the work on a Ray cluster: auto for the one of this machine, ray://HOST:PORT, or local.",
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    threads: options.Threads = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the result back and check it.")] = False,
    safe_only: options.SafeOnly = False,
    force: options.Force = False,
    every: options.All = False,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Compress a checkpoint.

    Writes ckpt.sc.safetensors beside ckpt.pt: a quarter of the size with the default preset, and training resumes from
    it as if nothing had happened. The file gets its name once it is whole and on the disk.
    """
    import statecodec
    from statecodec_cli import plots, tables

    plots.require(plot)
    streamed = standard.DASH in (str(src), output)
    if shard is not None:
        _refuse_beside("--shard", {"--verify": verify, "--plot": plot is not None, "-": streamed, "--ray": bool(ray)})
    if ray is not None:
        _refuse_beside("--ray", {"--threads": threads is not None, "-": streamed})
    with (
        standard.source(src) as source,
        standard.output(output, src=src, as_json=as_json) as target,
        reporting(quiet=quiet) as progress,
    ):
        settings: dict[str, Any] = {
            "preset": preset,
            "rules": tuple(rule or ()),
            "rules_file": rules,
            "strict": strict,
            "max_step_error": max_step_error,
            "max_update_error": max_update_error,
            "max_weight_error": max_weight_error,
            "pack": pack,
            "max_shard_size": None if output == standard.DASH else max_shard_size,
            "sha256": sha256,
            "base": base,
            "device": device,
            "safe_only": safe_only,
            "force": force,
            "progress": progress,
        }
        if shard is not None:
            share = statecodec.compress_share(source, target, share=shard, threads=threads, **settings).to_json()
            console.emit(share) if as_json else console.show(tables.share(console.printable(share)))
            return
        if ray is not None:
            from statecodec.distributed.on_ray import compress_on_ray

            report = compress_on_ray(source, target, address=ray, verify=verify, **settings)
        else:
            report = statecodec.compress(source, target, verify=verify, threads=threads, **settings)
    document = standard.written(output, report.to_json())
    if plot:
        plots.save(plots.report(document), plot)
    if as_json:
        console.emit(document)
    else:
        shown = tables.compressed(console.printable(document), every=every)
        console.show(*shown, to=sys.stderr if output == standard.DASH else None)


def _refuse_beside(option: str, others: dict[str, bool]) -> None:
    from statecodec.errors import UsageError

    for name, chosen in others.items():
        if chosen:
            raise UsageError(f"{name} does not go with {option}; see docs/cluster.md")
