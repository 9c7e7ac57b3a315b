"""One view of the tensors of a checkpoint, compressed or not, for everything that only wants to read numbers."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from statecodec import codecs
from statecodec.checkpoint.source_files import SourceFiles
from statecodec.checkpoint.stored import Stored, text
from statecodec.choose import Policy
from statecodec.choose.plan import Plan, make_plan
from statecodec.codecs.chunking import iterate
from statecodec.errors import FormatError
from statecodec.layouts import Moments, locate
from statecodec.verbs.paths import INDEX_SUFFIX

SKELETON_ROLES = ("skeleton", "file")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that can be streamed: its place in its set, and what is known of it."""

    index: int
    name: str
    role: str
    param: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSet(Protocol):
    """The tensors of one checkpoint, by name."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    moments: tuple[Moments, ...]
    listing: tuple[str, ...]
    """Files and folders of a directory, relative to it; of a single file, nothing."""

    def chunks(self, tensor: TensorInfo) -> Iterator[Tensor]:
        """The tensor's elements in order, flat, a chunk at a time, decoded."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class SourceTensors:
    """The tensors of an uncompressed checkpoint."""

    def __init__(self, path: str | Path) -> None:
        source = locate(path)
        self.path: Path = source.root
        self.plan: Plan = make_plan(source, Policy(()))
        self.files = SourceFiles(source)
        self.tensors: Mapping[str, TensorInfo] = {
            p.item.name: TensorInfo(
                i,
                p.item.name,
                str(p.item.attributes["role"]),
                p.item.attributes.get("param"),
                p.item.shape,
                p.item.dtype,
            )
            for i, p in enumerate(self.plan.items)
        }
        self.moments = tuple(m for i in range(len(source.files)) for m in self.plan.moments(i))
        self.listing = (*(f.path for f in source.files), *source.directories) if source.is_directory else ()

    def chunks(self, tensor: TensorInfo) -> Iterator[Tensor]:
        planned = self.plan.items[tensor.index]
        for chunk in iterate(codecs.Raw(), tensor.shape, tensor.dtype):
            yield self.files.read(self.plan, planned, chunk).reshape(-1)

    def close(self) -> None:
        return


class StoredTensors:
    """The tensors of a compressed checkpoint, decoded."""

    def __init__(self, path: str | Path) -> None:
        self.stored = Stored.open(path)
        self.path: Path = Path(path)
        self.tensors: Mapping[str, TensorInfo] = {
            item.name: TensorInfo(
                i,
                item.name,
                text(item.attributes.get("role")) or "other",
                text(item.attributes.get("param")),
                item.shape,
                item.dtype,
            )
            for i, item in enumerate(self.stored.reader.items)
        }
        document = self.stored.document
        self.moments = tuple(m for f in document.files for m in f.moments)
        self.listing = (*(f.path for f in document.files), *document.directories) if document.is_directory else ()

    def chunks(self, tensor: TensorInfo) -> Iterator[Tensor]:
        for number in self.stored.chunks(tensor.index):
            yield self.stored.decode_chunk(tensor.index, number).reshape(-1)

    def close(self) -> None:
        self.stored.close()


class Elements:
    """A stream of elements that can be taken in pieces of any size, whatever the chunks' sizes."""

    def __init__(self, chunks: Iterator[Tensor]) -> None:
        self._chunks, self._rest = chunks, torch.empty(0)

    def take(self, count: int) -> Tensor:
        """The next `count` elements, flat, as fp32 (fp64 stays fp64)."""
        pieces, missing = [], count
        while missing:
            if not self._rest.numel():
                self._rest = _floats(next(self._chunks))
                continue
            pieces.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= pieces[-1].numel()
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)


def is_compressed(path: str | Path) -> bool:
    """Whether a path is one of our files (by its content, not its name)."""
    path = Path(path)
    if path.is_dir():
        return False
    if not path.exists() or path.name.endswith(INDEX_SUFFIX):
        index = (
            path
            if path.exists()
            else path.with_name(path.name.removesuffix(".safetensors") + ".safetensors" + INDEX_SUFFIX)
        )
        return index.exists() and b"statecodec.manifest" in _head(index)
    return b'"format":"statecodec"' in _head(path)


def open_tensors(path: str | Path) -> TensorSet:
    """The tensors of any checkpoint. Raises FormatError or LayoutError."""
    return StoredTensors(path) if is_compressed(path) else SourceTensors(path)


def _head(path: Path) -> bytes:
    """The first bytes of a regular file; nothing of anything else, which might have no end, or never begin."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read(1 << 16) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from error


def _floats(chunk: Tensor) -> Tensor:
    return chunk if chunk.dtype in (torch.float32, torch.float64) else chunk.to(torch.float32)
