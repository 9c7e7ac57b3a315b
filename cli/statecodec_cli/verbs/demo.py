"""`statecodec demo`: the whole story on a small GPT trained on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statecodec_cli import console, options


def run(
    directory: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where its files go.")] = Path("demo"),
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=2, help="Training steps before the checkpoint.")
    ] = 300,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="N", min=1, help="Stop training after that long in any case.")
    ] = 45,
    resume_steps: Annotated[
        int,
        typer.Option(
            "--resume-steps", metavar="N", min=1, help="Steps after it, from each file; fewer on a slow machine."
        ),
    ] = 40,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the weights and of the order of the data.")] = 0,
    force: options.Force = False,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show it all on a small GPT.

    Train it on Python's own sources, compress its checkpoint, resume from both, compare the losses.

    Takes about two minutes on two CPU cores and needs no network. Everything stays in DIR.
    """
    from statecodec_cli import plots
    from statecodec_cli.demo import story

    plots.require(plot)
    document = story.tell(
        directory, story.Schedule(steps, seconds, resume_steps, seed), force=force, quiet=quiet or as_json
    )
    if plot:
        curves = {
            name: list(enumerate(run["losses"], document["training"]["steps"] + 1))
            for name, run in document["resumed"].items()
        }
        plots.save(plots.losses(curves, "Resuming from the exact and from the compressed checkpoint"), plot)
    if as_json:
        console.emit(document)
    else:
        console.show(*story.summary(document))
