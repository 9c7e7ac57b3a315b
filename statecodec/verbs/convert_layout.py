"""`convert --layout`: the same values in another framework's files.

Large tensors wait on disk beside the output, so memory is that of a few of them, whatever the size of the checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from statecodec.atomic import AtomicOutput
from statecodec.checkpoint.left_out import tensor_bytes, without_opaque, written_out
from statecodec.checkpoint.open import loaded, open_checkpoint
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.spill import Releasing, Spill
from statecodec.errors import UsageError
from statecodec.lazy import torch
from statecodec.progress import Meter, Progress
from statecodec.verbs.inspect import inspect
from statecodec.verbs.output_file import output_file
from statecodec.verbs.tensors_and_json import TensorsAndValues, taken_apart, write_tensors_and_json
from statecodec.verbs.zero_fp32 import zero_fp32

_NAMED = 20


@dataclass(frozen=True)
class ConversionRun:
    """Where the values of a checkpoint go, and the spill and meter of the conversion."""

    target: Path
    force: bool
    spill: Spill
    meter: Meter

    def used(self, nbytes: int) -> None:
        """Count bytes of tensors that were written."""
        self.spill.used(nbytes)
        self.meter.add(nbytes)


@dataclass(frozen=True)
class TargetLayout:
    """How a checkpoint becomes one layout, in three steps."""

    read: Callable[[Path, Spill], Any]
    """The values of a checkpoint, large tensors in the spill."""
    fit: Callable[[Any], tuple[Any, list[str]]]
    """What of them the layout can hold, and what it cannot: key paths, with what is there."""
    write: Callable[[Any, ConversionRun], None]
    folder: bool = False
    """It is a folder, not a file."""


def convert_layout(
    src: Path, dst: Path, layout: str, *, strict: bool = False, force: bool = False, progress: Progress | None = None
) -> Report:
    """Write the values of a checkpoint, compressed or not, as the layout's row in TARGETS says.

    Raises UsageError, OutputExists, OutputFailed, LayoutError, FormatError.
    """
    started, row = time.perf_counter(), TARGETS[layout]
    target = dst if row.folder else output_file(dst, None, force=force)
    with Spill(target.parent) as spill:
        value = row.read(src, spill)
        fitting, left_out = row.fit(value)
        if strict and left_out:
            raise UsageError(f"{src}: {layout} cannot hold {'; '.join(left_out[:_NAMED])}")
        row.write(fitting, ConversionRun(target, force, spill, Meter(progress, tensor_bytes(value), "writing")))
    report = inspect(target)
    more = [f"... and {len(left_out) - _NAMED} more"] if len(left_out) > _NAMED else []
    notes = [f"left out: {line}" for line in left_out[:_NAMED]] + more
    return replace(report, notes=(*report.notes, *notes), seconds=time.perf_counter() - started)


def _values(src: Path, spill: Spill) -> Any:
    """What a user would have loaded, with its large tensors on disk."""
    with open_checkpoint(src) as checkpoint:
        value = loaded(checkpoint, torch.device("cpu"), spill)
    spill.release()
    return value


def _apart(value: Any) -> tuple[TensorsAndValues, list[str]]:
    value, opaque = written_out(value)
    parts, strange = taken_apart(value)
    return parts, opaque + strange


def _write_torch(value: Any, work: ConversionRun) -> None:
    with AtomicOutput(work.target, force=work.force) as output:
        with output.create() as file:
            torch.save(value, cast(IO[bytes], Releasing(file, work)))
        output.publish()


def _write_safetensors(parts: TensorsAndValues, work: ConversionRun) -> None:
    write_tensors_and_json(parts, work.target, work.used, force=work.force)


def _write_dcp(value: Any, work: ConversionRun) -> None:
    if not isinstance(value, dict):
        raise UsageError(f"a DCP folder holds a dict; this is of type {type(value).__name__}")
    from statecodec.verbs.dcp_folder import write_dcp

    with AtomicOutput(work.target, directory=True, force=work.force) as output:
        write_dcp(value, output.path, work.used)
        output.finish()
        output.publish()


TARGETS = {
    "torch": TargetLayout(_values, without_opaque, _write_torch),
    "safetensors": TargetLayout(_values, _apart, _write_safetensors),
    "dcp": TargetLayout(_values, written_out, _write_dcp, folder=True),
    "zero-fp32": TargetLayout(zero_fp32, without_opaque, _write_torch),
}
"""A row for every one of `operations.LAYOUTS`."""
