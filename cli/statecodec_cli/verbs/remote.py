"""`statecodec remote`: convert on a conversion service: upload with resume, wait, download, verify.

The operations and their options come from the library's table (statecodec/operations.py).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from statecodec.errors import OutputExists, UsageError
from statecodec.operations import OPERATIONS, Operation, Option
from statecodec.suffixes import SUFFIX, stem
from statecodec_cli import console, options, standard
from statecodec_cli.progress import Callback, reporting

_TYPES: dict[str, Any] = {"flag": bool | None, "number": float | None, "text": str | None, "texts": list[str] | None}


def _flag(option: Option) -> str:
    return f"--{option.flag or option.name.replace('_', '-')}"


def _declared(option: Option, names: Iterable[str]) -> inspect.Parameter:
    """A row of the table as a parameter of the verb; without a value the library's default holds."""
    kind = _TYPES.get(option.kind)
    if option.kind == "choice":
        kind = Literal[tuple(option.choices or ())] | None
    spelled = _flag(option)
    if option.kind == "flag":
        spelled += f"/--no-{spelled[2:]}"
    words = f"{option.help} ({', '.join(names)})"
    metavar = {"number": "X", "text": "TEXT", "texts": "TEXT"}.get(option.kind)
    told = typer.Option(spelled, metavar=metavar, show_default=False, help=words)
    if (option.kind, option.at_most) == ("number", 1.0):
        told = options.fraction(spelled, words)
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, told]
    )


def _declare(function: Callable[..., None]) -> Callable[..., None]:
    """Give the verb one option for every row of the table, in place of its `**chosen`."""
    takers: dict[str, tuple[Option, list[str]]] = {}
    for operation in OPERATIONS.values():
        for option in operation.options:
            takers.setdefault(option.name, (option, []))[1].append(operation.name)
    chosen = [_declared(option, names) for option, names in takers.values()]
    signature = inspect.signature(function, eval_str=True)
    fixed = [parameter for name, parameter in signature.parameters.items() if name != "chosen"]
    parameters = [*fixed[:6], *chosen, *fixed[6:]]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


@_declare
def run(
    operation: Annotated[
        str, typer.Argument(metavar="OPERATION", show_default=False, help=f"One of {', '.join(OPERATIONS)}.")
    ],
    src: Annotated[Path, options.source("A checkpoint file or directory; - for standard input.")],
    *,
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
            help="compress, restore: base; verify: original; diff: B.",
        ),
    ] = None,
    force: options.Force = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave upload and result on the service until they expire.")
    ] = False,
    every: options.All = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    **chosen: Any,
) -> None:
    """Convert on a conversion service.

    Uploads SRC, goes on where an interrupted upload was, waits for the job, downloads the result and compares SHA-256.
    What it prints is what the verb of that name prints.
    """
    try:
        from statecodec_client import Client
    except ImportError as error:
        raise typer.BadParameter(f"this needs {error.name}: pip install 'statecodec[remote]'") from None
    row = OPERATIONS.get(operation)
    if row is None:
        raise UsageError(f"there is no operation {operation!r}; there are {', '.join(OPERATIONS)}")
    checked = row.accepted({name: value for name, value in chosen.items() if value != []})
    if other is not None and row.other is None:
        raise UsageError(f"{operation} takes one checkpoint; --other has no meaning there")
    if other is None and row.other_needed:
        raise UsageError(f"{operation} needs --other: {row.other_help}")
    target = _target(row, src, output, force=force)
    with (
        standard.source(src) as source,
        Client(server, token) as client,
        reporting(quiet=quiet) as progress,
    ):
        document = _carry_out(client, operation, source, other, checked, target, keep, progress or _ignore)
    if as_json:
        console.emit(document)
        return
    _show(operation, console.printable(document["report"]), every=every, against=other is not None)
    if target is not None:
        console.say(f"{target}: {console.size(document['job']['bytes_out'])}, SHA-256 compared")


def _ignore(done: int, total: int, stage: str) -> None:
    pass


def _show(operation: str, report: dict[str, Any], *, every: bool, against: bool) -> None:
    """Print a report as the local verb does; as JSON where no table is made for the operation."""
    from statecodec_cli import analysis_tables, tables

    show: dict[str, Callable[[], Any]] = {
        "compress": lambda: tables.compressed(report, every=every),
        "restore": lambda: tables.restored(report),
        "inspect": lambda: tables.inspected(report, every=every),
        "verify": lambda: tables.verified(report, against=against),
        "diff": lambda: tables.difference(report, every=every),
        "analyze": lambda: analysis_tables.analyzed(report, every=every),
        "convert": lambda: analysis_tables.converted(report, every=every),
    }
    if operation in show:
        console.show(*show[operation]())
    else:
        console.emit(report)


def _target(row: Operation, src: Path, output: str | None, *, force: bool) -> Path | None:
    """Where the result goes, refused before anything is uploaded; None when there is only a report."""
    if not row.makes_files:
        if output is not None:
            raise UsageError(f"{row.name} makes no file; its result is printed, with --json as JSON")
        return None
    if output == standard.DASH:
        raise UsageError("remote writes files: -o takes the name of one, or of a folder")
    if str(src) == standard.DASH and output is None:
        raise UsageError("what comes from standard input has no name to derive the output's from: give -o")
    name = (stem(src.name) if src.is_file() else src.name) + SUFFIX
    if row.name == "restore":
        name = src.name[: -len(SUFFIX)] if src.name.endswith(SUFFIX) else f"{src.name}.restored"
    if output is None:
        if row.name == "convert":
            raise UsageError("convert needs -o: where to write the result")
        target = src.with_name(name)
    else:
        target = Path(output) / name if output.endswith("/") or Path(output).is_dir() else Path(output)
    if target.exists() and not force:
        raise OutputExists(f"{target} is there already: give --force to replace it, or another -o")
    return target


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
