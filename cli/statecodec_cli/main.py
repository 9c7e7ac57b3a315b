"""`statecodec`: the table of verbs, and the one place where an exception becomes a message and an exit code.

Exit codes: 0 done, 1 refused or a check failed, 2 the call itself is wrong, 130 Ctrl-C, 143 SIGTERM. Standard output
carries data only; everything said about it goes to standard error.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from statecodec.operations import OPERATIONS
from statecodec_cli import console
from statecodec_cli.verbs import (
    analyze,
    codecs,
    compress,
    convert,
    demo,
    diff,
    finalize,
    inspect,
    remote,
    restore,
    serve,
    verify,
    worker,
)

_KEYWORD = re.compile(r"\A[a-z_]+(?=[:=])")  # that a message of the library begins with

VERBS: dict[str, Callable[..., None]] = {
    "compress": compress.run,
    "finalize": finalize.run,
    "restore": restore.run,
    "inspect": inspect.run,
    "verify": verify.run,
    "diff": diff.run,
    "analyze": analyze.run,
    "convert": convert.run,
    "codecs": codecs.run,
    "serve": serve.run,
    "worker": worker.run,
    "remote": remote.run,
    "demo": demo.run,
}


class _Verb(TyperCommand):
    """A verb's help as people read it: SRC, not {SRC} or SRC <Path>."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        arguments: list[Any] = [p for p in self.params if p.param_type_name == "argument"]
        for argument in arguments:
            argument.display_type_rich = lambda ctx: ""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words of the usage line after the verb."""
        return [re.sub(r"\.{4,}", "...", re.sub("[{}]", "", piece)) for piece in super().collect_usage_pieces(ctx)]


app = typer.Typer(
    name="statecodec",
    help="Training checkpoints at a quarter of their size, from which training resumes as if nothing had happened.",
    epilog="`statecodec VERB --help` explains a verb. Exit codes: 0 done, 1 refused or a check failed, 2 usage.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it fits narrow terminals and loads faster
)
for _name, _run in VERBS.items():
    app.command(_name, cls=_Verb)(_run)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"statecodec {version('statecodec')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; never raises for anything a user can cause."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    with _terminable() as received:
        try:
            code = app(arguments, prog_name="statecodec", standalone_mode=False)
            sys.stdout.flush()
        except typer.TyperException as error:  # unknown option, bad value: the call is wrong
            console.fail("usage", error.format_message().replace("Value error, ", ""), as_json=as_json)
            return error.exit_code
        except typer.Abort:
            return 1
        except BrokenPipeError:  # the reader of our output left, as in `statecodec inspect x | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            console.fail("io", _describe(error), as_json=as_json)
            return 1
        except Exception as error:
            return _deliberate(error, as_json=as_json)
        if received:
            return 128 + received[-1]
    return code if isinstance(code, int) else 0


def _deliberate(error: Exception, *, as_json: bool) -> int:
    """The exit code for one of the library's own errors, after saying it; anything else is a bug and is re-raised."""
    from statecodec.errors import StatecodecError, UsageError

    if not isinstance(error, StatecodecError):
        raise error
    usage = isinstance(error, UsageError)
    message = _KEYWORD.sub(_option, str(error)) if usage else str(error)
    console.fail(error.code, message, as_json=as_json)
    return 2 if usage else 1


def _option(keyword: re.Match[str]) -> str:
    """The option that a keyword of the library is on the command line; what is none stays as it is."""
    names = {option.name for operation in OPERATIONS.values() for option in operation.options}
    return f"--{keyword[0].replace('_', '-')}" if keyword[0] in names else keyword[0]


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _ignores_exceptions(frame: FrameType | None) -> bool:
    """Whether an exception may disappear here: Python ignores those of `__del__`, and imports of C extensions may."""
    while frame is not None and frame.f_code is not main.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib") or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """Make SIGTERM unwind the stack like Ctrl-C, so that half-written files are removed; yields what was received."""
    received: list[int] = []
    again: list[threading.Timer] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if _ignores_exceptions(frame):  # the same signal again, a little later
            again.append(threading.Timer(0.01, os.kill, (os.getpid(), number)))
            again[-1].start()
            return
        raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the embedding program owns the signals
        yield received
        return
    try:
        yield received
    finally:
        for timer in again:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
