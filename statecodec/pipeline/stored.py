"""A compressed checkpoint, opened: the Reader's items together with the document that says what they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statecodec import codecs, kernels
from statecodec.errors import FormatError
from statecodec.format import Limits, Reader, StoredItem
from statecodec.pipeline import document as documents
from statecodec.pipeline.report import Report, TensorReport


@dataclass(frozen=True)
class Stored:
    """An open compressed checkpoint. Close it, or use it as a context manager."""

    path: Path
    reader: Reader
    document: documents.Document

    @classmethod
    def open(cls, path: str | Path, limits: Limits | None = None) -> Stored:
        """Open and check the manifest. Raises FormatError and its subclasses."""
        reader = Reader(path, limits or Limits())
        try:
            sizes = [item.decoded_nbytes for item in reader.items]
            return cls(Path(path), reader, documents.from_json(reader.document, sizes))
        except BaseException:
            reader.close()
            raise

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    def chunks(self, item: int) -> Iterator[int]:
        """Chunk numbers of an item."""
        return iter(range(len(self.reader.items[item].chunks)))

    def decode_chunk(self, item: int, chunk: int, device: torch.device | None = None) -> Tensor:
        """One chunk of an item, checked and decoded, in the chunk's shape and the item's dtype."""
        stored = self.reader.items[item]
        parts = self.reader.read_chunk(item, chunk)
        if isinstance(stored.codec, codecs.Raw):
            return parts["data"].view(stored.chunks[chunk].shape)
        target = device or torch.device("cpu")
        out = torch.empty(stored.chunks[chunk].shape, dtype=stored.dtype, device=target)
        moved = {name: part.to(target) for name, part in parts.items()}
        stored.codec.decode_into(moved, out, kernels.resolve(None, target))
        return out.to("cpu")

    def decode(self, item: int) -> Tensor:
        """A whole item, checked and decoded."""
        stored = self.reader.items[item]
        if len(stored.chunks) == 1:
            return self.decode_chunk(item, 0).view(stored.shape)
        out = torch.empty(stored.shape, dtype=stored.dtype)
        flat = out.view(-1)
        for number, chunk in enumerate(stored.chunks):
            flat[chunk.start : chunk.stop] = self.decode_chunk(item, number).view(-1)
        return out


def report_of(path: str | Path, seconds: float = 0.0) -> Report:
    """The report of a compressed checkpoint, from its manifest alone."""
    with Stored.open(path) as stored:
        reader, document = stored.reader, stored.document
        return Report(
            path=str(path),
            format_version=reader.format_version,
            source=document.source,
            bytes=sum(file.stat().st_size for file in reader.files),
            tensors=tuple(tensor_report(item) for item in reader.items),
            seconds=seconds,
            preset=document.preset,
            rules=document.rules,
            notes=document.notes,
            files=tuple(str(file) for file in reader.files),
        )


def tensor_report(item: StoredItem) -> TensorReport:
    """The report of one stored item."""
    attributes = item.attributes
    return TensorReport(
        name=item.name,
        role=text(attributes.get("role")) or "other",
        param=text(attributes.get("param")),
        shape=item.shape,
        dtype=str(item.dtype).removeprefix("torch."),
        codec=codecs.format_codec(item.codec),
        bytes_before=item.decoded_nbytes,
        bytes_after=item.stored_nbytes,
        error=_error(attributes.get("error")),
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
