"""What jobs can do: one row per operation, and only those the installed library really has are offered.

Adding one is one row in OPERATIONS (and its options model). Nothing here imports torch: the HTTP process reads the
names the library exports, the child process calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

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
    run: Callable[[Callable[..., Any], Call], Any]
    other: str | None = None
    other_needed: bool = False
    makes_files: bool = False


def stem(name: str) -> str:
    """A checkpoint's name without the endings this tool and torch give it."""
    for suffix in (SUFFIX, ".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar"):
        if name.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def _compress(function: Callable[..., Any], call: Call) -> Any:
    options = {key: value for key, value in call.options.items() if value is not None}
    return function(
        call.source,
        call.output / f"{stem(call.name)}{SUFFIX}",
        base=call.other,
        progress=call.progress,
        threads=call.threads,
        device="cpu",
        **options,
    )


def _restore(function: Callable[..., Any], call: Call) -> Any:
    target = call.output / (stem(call.name) if call.name.endswith(SUFFIX) else f"{stem(call.name)}.restored")
    return function(call.source, target, progress=call.progress, threads=call.threads, device="cpu")


def _inspect(function: Callable[..., Any], call: Call) -> Any:
    return function(call.source)


def _verify(function: Callable[..., Any], call: Call) -> Any:
    return function(call.source, call.other, progress=call.progress)


def _diff(function: Callable[..., Any], call: Call) -> Any:
    return function(call.source, call.other, progress=call.progress)


OPERATIONS: tuple[Operation, ...] = (
    Operation("inspect", "inspect", NoOptions, "Say what is in a checkpoint.", _inspect),
    Operation(
        "compress", "compress", CompressOptions, "Make a checkpoint small.", _compress, other="base", makes_files=True
    ),
    Operation("restore", "restore", NoOptions, "Give the original file or folder back.", _restore, makes_files=True),
    Operation("verify", "verify", NoOptions, "Check every checksum.", _verify, other="against"),
    Operation("diff", "diff", NoOptions, "Compare two checkpoints.", _diff, other="other", other_needed=True),
)


def offered(backend: str) -> dict[str, Operation]:
    """The operations whose function the library exports."""
    exported = set(getattr(import_module(backend), "__all__", ()))
    return {operation.name: operation for operation in OPERATIONS if operation.function in exported}
