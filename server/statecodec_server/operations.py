"""How each operation of the library's table is carried out for a job, and which of them the installed library has.

The table itself is `statecodec.operations`. An operation that makes files needs a function here, which names them. The
HTTP process never imports torch: it asks a process of its own what the library exports and which parameters its
functions take.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from statecodec.operations import LAYOUTS, OPERATIONS, Operation
from statecodec.suffixes import SUFFIX, stem

from .names import clean_name


@dataclass(frozen=True)
class OperationCall:
    """What a child process hands to an operation; paths are relative to the job's folder."""

    source: Path
    other: Path | None
    output: Path
    name: str
    options: Mapping[str, Any]
    threads: int
    progress: Callable[[int, int, str], None]


def _compressed(path: Path) -> Path:
    """The index of a compressed checkpoint of several shards, which arrives as a folder; else the path itself."""
    indexes = sorted(path.glob("*.index.json")) if path.is_dir() else []
    return indexes[0] if len(indexes) == 1 else path


def _keywords(function: Callable[..., Any], call: OperationCall) -> dict[str, Any]:
    """The job's options, and of the service's own keywords those that the function takes."""
    settings = {"progress": call.progress, "threads": call.threads, "device": "cpu"}
    taken = inspect.signature(function).parameters
    return {**{name: value for name, value in settings.items() if name in taken}, **call.options}


def _compress(library: Any, call: OperationCall) -> Any:
    target = call.output / f"{stem(call.name)}{SUFFIX}"
    keywords = _keywords(library.compress, call)
    if call.other is not None:
        keywords["base"] = call.output / call.other.name  # laid there by the worker: a link and its base lie together
        if keywords["base"] == target:
            target = call.output / f"{stem(call.name)}.next{SUFFIX}"
    return library.compress(call.source, target, **keywords)


def _restore(library: Any, call: OperationCall) -> Any:
    source = _compressed(call.source)
    original = library.inspect(source).to_json()["source"]["name"]  # from inside the file: cleaned before use
    target = call.output / clean_name(Path(str(original)).name)
    return library.restore(source, target, **_keywords(library.restore, call))


def _verify(library: Any, call: OperationCall) -> Any:
    return library.verify(_compressed(call.source), call.other, **_keywords(library.verify, call))


def _converted_suffix(options: Mapping[str, Any]) -> str:
    """The ending of what `convert` makes: of another layout, a compressed file by rules, or an optimizer's state."""
    if "layout" in options:
        return LAYOUTS[options["layout"]].suffix
    return SUFFIX if "=" in options["to"][0].split("(")[0] else ".pt"


def _convert(library: Any, call: OperationCall) -> Any:
    target = call.output / f"{stem(call.name)}{_converted_suffix(call.options)}"
    return library.convert(_compressed(call.source), target, **_keywords(library.convert, call))


_RUN: dict[str, Callable[[Any, OperationCall], Any]] = {
    "compress": _compress,
    "restore": _restore,
    "verify": _verify,
    "convert": _convert,
}


def run(library: Any, operation: Operation, call: OperationCall) -> Any:
    """Carry out an operation for a job. Returns the report of the library's function.

    An operation without a row in _RUN makes no files: its function gets the checkpoint, and the second one if there is
    one.
    """
    if operation.name in _RUN:
        return _RUN[operation.name](library, call)
    function = getattr(library, operation.name)
    inputs = [_compressed(path) for path in (call.source, call.other) if path is not None]
    return function(*inputs, **_keywords(function, call))


def parameters(backend: str) -> dict[str, list[str]]:
    """The functions a library exports and the parameters they take. Imports it: for child processes."""
    library = import_module(backend)
    functions = {name: getattr(library, name) for name in library.__all__}
    return {
        name: list(inspect.signature(function).parameters)
        for name, function in functions.items()
        if inspect.isfunction(function)
    }


@lru_cache(maxsize=4)
def describe(backend: str) -> dict[str, list[str]]:
    """`parameters`, asked of a process of its own: the caller never imports torch."""
    command = [sys.executable, "-m", __name__, backend]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    parameters_of: dict[str, list[str]] = json.loads(done.stdout)
    return parameters_of


def offer(operation: Operation, taken: Sequence[str]) -> Operation:
    """The operation as the installed library has it: an option that its function does not take is not offered.

    Restoring takes no base as an argument: it lies beside the file.
    """
    takes_other = operation.other in taken or operation.name == "restore"
    options = tuple(option for option in operation.options if option.name in taken)
    one_of = operation.one_of if set(operation.one_of) <= set(taken) else ()
    return replace(operation, options=options, one_of=one_of, other=operation.other if takes_other else None)


def offers(backend: str) -> dict[str, Operation]:
    """The operations whose function the library exports."""
    described = describe(backend)
    return {name: offer(item, described[name]) for name, item in OPERATIONS.items() if name in described}


if __name__ == "__main__":
    print(json.dumps(parameters(sys.argv[1])))
