"""The report of a compressed checkpoint, from its manifest and its document."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from statecodec.checkpoint.document import Document
from statecodec.checkpoint.report import Report, TensorReport
from statecodec.checkpoint.states import ATTRIBUTE, encoded_state
from statecodec.errors import FormatError
from statecodec.format import StoredItem


def stored_report(
    path: Path,
    version: tuple[int, int],
    document: Document,
    items: Iterable[StoredItem],
    files: Iterable[Path],
    seconds: float = 0.0,
) -> Report:
    """The report of a compressed checkpoint that was just written, or opened."""
    files = tuple(files)
    return Report(
        path=str(path),
        format_version=version,
        source=document.source,
        bytes=sum(file.stat().st_size for file in files),
        tensors=tuple(tensor_report(item) for item in items),
        seconds=seconds,
        preset=document.preset,
        rules=document.rules,
        asked=document.asked,
        notes=document.notes,
        files=tuple(str(file) for file in files),
    )


def tensor_report(item: StoredItem) -> TensorReport:
    """The report of one stored item."""
    attributes = item.attributes
    return TensorReport(
        name=item.name,
        role=text(attributes.get("role")) or "other",
        param=text(attributes.get("param")),
        shape=item.shape,
        dtype=item.dtype.name,
        codec=str(item.encoding),
        bytes_before=item.decoded_nbytes,
        bytes_after=item.stored_nbytes,
        error=_error(attributes.get("error")),
        state=encoded_state(attributes.get(ATTRIBUTE), item.name, item.shape, item.dtype),
    )


def text(value: Any) -> str | None:
    """A string of an untrusted document, or None. Raises FormatError for anything else."""
    if value is not None and not isinstance(value, str):
        raise FormatError(f"an attribute is {str(value)[:40]!r} where text was expected")
    return value


def _error(value: Any) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(type(v) in (int, float) and math.isfinite(v) for v in value.values()):
        raise FormatError("an error attribute does not hold numbers")
    return {str(k): float(v) for k, v in value.items()}
