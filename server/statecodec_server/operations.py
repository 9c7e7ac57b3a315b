"""What jobs can do: one row per operation, and only those the installed library really has are offered.

Adding one is one row in OPERATIONS (and its options model). The HTTP process never imports torch: it asks a process of
its own what the library exports and which parameters its functions take.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from .names import clean_name

Rule = Annotated[str, StringConstraints(min_length=3, max_length=500)]
SUFFIX = ".sc.safetensors"


class Options(BaseModel):
    """Base of every operation's options: unknown names are refused."""

    model_config = ConfigDict(extra="forbid")


class NoOptions(Options):
    """An operation without settings."""


class CompressOptions(Options):
    """The arguments of `statecodec compress`."""

    preset: Literal["lossless", "resume", "small", "tiny", "weights"] = Field(default="resume", examples=["resume"])
    rules: list[Rule] = Field(default_factory=list, max_length=200, examples=[["*.exp_avg_sq=companded(curve=log)"]])
    pack: str = Field(default="zstd", pattern=r"^(none|zstd(:-?[0-9]{1,2})?)$")
    max_shard_size: str | None = Field(default=None, pattern=r"^[1-9][0-9]{0,5} ?([KMGT]i?)?B$", examples=["5GB"])
    max_update_error: float | None = Field(default=None, gt=0, le=1, description="budget: relative error of the update")
    max_weight_error: float | None = Field(
        default=None, gt=0, le=1, description="budget: relative error of the weights"
    )
    verify: bool = Field(default=False, description="decode everything again and compare before reporting success")


class AnalyzeOptions(Options):
    """The arguments of `statecodec analyze`."""

    snr: bool = Field(default=True, description="signal-to-noise ratio of second moments, per dimension")
    curve: bool = Field(default=False, description="size against error of the update")
    cutoff: float | None = Field(default=None, gt=0, le=1e6)


class ConvertOptions(Options):
    """The arguments of `statecodec convert`: rules, or one optimizer."""

    to: list[Rule] = Field(min_length=1, max_length=200, examples=[["exp_avg_sq=shared(dims=[1])"], ["foam(level=2)"]])
    pack: str = Field(default="zstd", pattern=r"^(none|zstd(:-?[0-9]{1,2})?)$")


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


@dataclass(frozen=True)
class Operation:
    """`function` of the library, its options, what `other` means to it, and whether it makes files."""

    name: str
    function: str
    options: type[Options]
    summary: str
    run: Callable[[Any, Call], Any]
    other: str | None = None
    other_needed: bool = False
    makes_files: bool = False


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
    options = {key: value for key, value in call.options.items() if value is not None}
    target = call.output / f"{stem(call.name)}{SUFFIX}"
    if call.other is None:
        return library.compress(
            call.source, target, progress=call.progress, threads=call.threads, device="cpu", **options
        )
    base = call.output / call.other.name  # laid there by the worker: what builds on a file lies beside it
    if base == target:
        target = call.output / f"{stem(call.name)}.next{SUFFIX}"
    return library.compress(
        call.source, target, base=base, progress=call.progress, threads=call.threads, device="cpu", **options
    )


def _restore(library: Any, call: Call) -> Any:
    source = _compressed(call.source)
    original = library.inspect(source).to_json()["source"]["name"]  # from inside the file: cleaned before use
    target = call.output / clean_name(Path(str(original)).name)
    return library.restore(source, target, progress=call.progress, threads=call.threads, device="cpu")


def _inspect(library: Any, call: Call) -> Any:
    return library.inspect(_compressed(call.source))


def _verify(library: Any, call: Call) -> Any:
    return library.verify(_compressed(call.source), call.other, progress=call.progress)


def _diff(library: Any, call: Call) -> Any:
    assert call.other is not None
    return library.diff(_compressed(call.source), _compressed(call.other), progress=call.progress)


def _analyze(library: Any, call: Call) -> Any:
    options = {key: value for key, value in call.options.items() if value is not None}
    return library.analyze(_compressed(call.source), progress=call.progress, threads=call.threads, **options)


def _convert(library: Any, call: Call) -> Any:
    is_rule = "=" in call.options["to"][0].split("(")[0]
    target = call.output / f"{stem(call.name)}{SUFFIX if is_rule else '.pt'}"
    return library.convert(
        _compressed(call.source), target, progress=call.progress, threads=call.threads, **call.options
    )


OPERATIONS: tuple[Operation, ...] = (
    Operation("inspect", "inspect", NoOptions, "Say what is in a checkpoint.", _inspect),
    Operation(
        "compress", "compress", CompressOptions, "Make a checkpoint small.", _compress, other="base", makes_files=True
    ),
    Operation(
        "restore",
        "restore",
        NoOptions,
        "Give the original file or folder back.",
        _restore,
        other="base",
        makes_files=True,
    ),
    Operation("verify", "verify", NoOptions, "Check every checksum.", _verify, other="against"),
    Operation("diff", "diff", NoOptions, "Compare two checkpoints.", _diff, other="other", other_needed=True),
    Operation("analyze", "analyze", AnalyzeOptions, "Measure what could be shared and how far.", _analyze),
    Operation(
        "convert", "convert", ConvertOptions, "Other codecs, or another optimizer's state.", _convert, makes_files=True
    ),
)


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


class Offer:
    """An operation as the installed library has it: an option its function does not take is not offered."""

    def __init__(self, operation: Operation, taken: Sequence[str]) -> None:
        self.operation = operation
        known = operation.other_needed or operation.other in taken or operation.name == "restore"
        self.other = operation.other if known else None
        self.fields = [name for name in operation.options.model_fields if name in taken]

    def schema(self) -> dict[str, Any]:
        """JSON schema of the options."""
        schema = self.operation.options.model_json_schema()
        schema["properties"] = {name: schema["properties"][name] for name in self.fields}
        return schema

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options as the library takes them; raises pydantic.ValidationError, or ValueError with a sentence."""
        checked = self.operation.options.model_validate(given).model_dump(exclude_unset=True)
        if unknown := set(checked) - set(self.fields):
            raise ValueError(f"the library of this service does not take {', '.join(sorted(unknown))}")
        return checked


def offers(backend: str) -> dict[str, Offer]:
    """The operations whose function the library exports."""
    found = describe(backend)
    return {item.name: Offer(item, found[item.function]) for item in OPERATIONS if item.function in found}


if __name__ == "__main__":
    print(json.dumps(parameters(sys.argv[1])))
