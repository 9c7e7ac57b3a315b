"""`statecodec remote`: let a conversion service do it - upload with resume, wait, download, verify."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from statecodec_cli import console, options
from statecodec_cli.progress import Callback, reporting

Operation = Literal["compress", "restore", "inspect", "verify", "diff", "analyze"]
Preset = Literal["lossless", "resume", "small", "tiny", "weights"]
SUFFIX = ".sc.safetensors"


def run(
    operation: Annotated[Operation, typer.Argument(metavar="OPERATION", show_default=False, help="What to do.")],
    src: Annotated[
        Path, typer.Argument(metavar="SRC", exists=True, show_default=False, help="A checkpoint file or directory.")
    ],
    server: Annotated[
        str,
        typer.Option(
            "--server", metavar="URL", envvar="STATECODEC_SERVER", show_default=False, help="The service's address."
        ),
    ],
    token: Annotated[
        str | None,
        typer.Option(
            "--token", metavar="TOKEN", envvar="STATECODEC_TOKEN", show_default=False, help="Or STATECODEC_TOKEN."
        ),
    ] = None,
    output: options.Output = None,
    other: Annotated[
        Path | None,
        typer.Option(
            "--other",
            metavar="PATH",
            exists=True,
            show_default=False,
            help="compress: base; verify: original; diff: B.",
        ),
    ] = None,
    preset: Annotated[Preset, typer.Option("--preset", "-p", help="See `statecodec codecs`.")] = "resume",
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", metavar="PATTERN=CODEC", show_default=False, help="As for compress. Repeatable."),
    ] = None,
    max_update_error: Annotated[
        float | None,
        typer.Option("--max-update-error", metavar="X", show_default=False, help="Budget for the update's error."),
    ] = None,
    force: options.Force = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave upload and result on the service until they expire.")
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert on a conversion service.

    Uploads SRC, goes on where an interrupted upload was, waits for the job, downloads the result and compares SHA-256.
    """
    try:
        from statecodec_server.client import Client
    except ImportError as error:
        raise typer.BadParameter(f"this needs {error.name}: pip install 'statecodec[remote]'") from None
    target = _target(operation, src, None if output is None else Path(output), force=force)
    chosen: dict[str, Any] = {}
    if operation == "compress":
        chosen = {"preset": preset, "rules": rule or None, "max_update_error": max_update_error}
        chosen = {name: value for name, value in chosen.items() if value is not None}
    with Client(server, token) as client, reporting(quiet=quiet) as progress:
        document = _carry_out(client, operation, src, other, chosen, target, keep, progress or _ignore)
    if as_json:
        console.emit(document)
    elif target is not None:
        before, after = document["job"]["bytes_in"], document["job"]["bytes_out"]
        console.say(f"{target}: {console.size(after)}, {console.ratio(before, after)}, SHA-256 compared")
    else:
        console.emit(document["report"])


def _ignore(done: int, total: int, stage: str) -> None:
    pass


def _target(operation: str, src: Path, output: Path | None, *, force: bool) -> Path | None:
    """Where the result goes, refused before anything is uploaded; None when there is only a report."""
    from statecodec.errors import OutputExists

    if operation not in ("compress", "restore"):
        return None
    if output is None and operation == "compress":
        output = src.with_name((src.stem if src.is_file() else src.name) + SUFFIX)
    elif output is None:
        known = src.name.endswith(SUFFIX)
        output = src.with_name(src.name[: -len(SUFFIX)] if known else f"{src.name}.restored")
    if output.exists() and not force:
        raise OutputExists(f"{output} is there already: give --force to replace it, or another -o")
    return output


def _carry_out(
    client: Any,
    operation: str,
    src: Path,
    other: Path | None,
    chosen: dict[str, Any],
    target: Path | None,
    keep: bool,
    progress: Callback,
) -> dict[str, Any]:
    source = client.source(src, progress=progress)
    second = None if other is None else client.source(other, progress=progress)
    request = repr((operation, source, second, sorted(chosen.items())))
    key = hashlib.sha256(request.encode()).hexdigest()
    job = client.wait(client.submit(operation, source, other=second, options=chosen, key=key), progress=progress)
    report = client.report(job)
    files = [] if target is None else client.download(job, target, progress=progress)
    if not keep:
        client.delete(job)
        for used in (source, second):
            if used is not None:
                client.forget(used)
    return {"job": job, "report": report, "files": [str(path) for path in files]}
