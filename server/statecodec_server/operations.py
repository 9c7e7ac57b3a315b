"""How each operation of the library's table is carried out for a job, and which of them the installed library has.

The table itself is `statecodec.operations`; adding an operation is one row there and one function here. The HTTP
process never imports torch: it asks a process of its own what the library exports and which parameters its
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

from statecodec.operations import OPERATIONS, Operation

from .names import clean_name

SUFFIX = ".sc.safetensors"


@dataclass(frozen=True)
class Call:
    """What a child process hands to an operation; paths are relative to the job's folder."""

    source: Path
    other: Path | None
    output: Path
    name: str
    options: Mapping[str, Any]
    threads: int
    progress: Callable[[int, int, str], None]


def stem(name: str) -> str:
    """A checkpoint's name without the endings this tool and torch give it."""
    for suffix in (SUFFIX, ".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar"):
        if name.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def _compressed(path: Path) -> Path:
    """A compressed checkpoint of several shards arrives as a folder; its index stands for it."""
    indexes = sorted(path.glob("*.index.json")) if path.is_dir() else []
    return indexes[0] if len(indexes) == 1 else path


def _compress(library: Any, call: Call) -> Any:
    target = call.output / f"{stem(call.name)}{SUFFIX}"
    if call.other is None:
        return library.compress(
            call.source, target, progress=call.progress, threads=call.threads, device="cpu", **call.options
        )
    base = call.output / call.other.name  # laid there by the worker: what builds on a file lies beside it
    if base == target:
        target = call.output / f"{stem(call.name)}.next{SUFFIX}"
    return library.compress(
        call.source, target, base=base, progress=call.progress, threads=call.threads, device="cpu", **call.options
    )


def _restore(library: Any, call: Call) -> Any:
    source = _compressed(call.source)
    original = library.inspect(source).to_json()["source"]["name"]  # from inside the file: cleaned before use
    target = call.output / clean_name(Path(str(original)).name)
    return library.restore(source, target, progress=call.progress, threads=call.threads, device="cpu", **call.options)


def _inspect(library: Any, call: Call) -> Any:
    return library.inspect(_compressed(call.source), **call.options)


def _verify(library: Any, call: Call) -> Any:
    return library.verify(_compressed(call.source), call.other, progress=call.progress)


def _diff(library: Any, call: Call) -> Any:
    assert call.other is not None
    return library.diff(_compressed(call.source), _compressed(call.other), progress=call.progress)


def _analyze(library: Any, call: Call) -> Any:
    return library.analyze(_compressed(call.source), progress=call.progress, threads=call.threads, **call.options)


def _convert(library: Any, call: Call) -> Any:
    is_rule = "=" in call.options["to"][0].split("(")[0]
    target = call.output / f"{stem(call.name)}{SUFFIX if is_rule else '.pt'}"
    return library.convert(
        _compressed(call.source), target, progress=call.progress, threads=call.threads, **call.options
    )


RUN: dict[str, Callable[[Any, Call], Any]] = {
    "compress": _compress,
    "restore": _restore,
    "inspect": _inspect,
    "verify": _verify,
    "diff": _diff,
    "analyze": _analyze,
    "convert": _convert,
}


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
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def _offer(operation: Operation, taken: Sequence[str]) -> Operation:
    """The operation as the installed library has it: an option that its function does not take is not offered.

    Restoring takes no base as an argument: it lies beside the file."""
    known = operation.other in taken or operation.name == "restore"
    options = tuple(option for option in operation.options if option.name in taken)
    return replace(operation, options=options, other=operation.other if known else None)


def offers(backend: str) -> dict[str, Operation]:
    """The operations whose function the library exports."""
    found = describe(backend)
    return {name: _offer(item, found[name]) for name, item in OPERATIONS.items() if name in found}


if __name__ == "__main__":
    print(json.dumps(parameters(sys.argv[1])))
