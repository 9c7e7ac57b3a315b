"""An uncompressed checkpoint, open: located once, read chunk by chunk, and watched for changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statecodec import codecs
from statecodec.buffers import Scratch, memory
from statecodec.checkpoint.base import Checkpoint, Place, TensorInfo
from statecodec.checkpoint.document import StoredFile
from statecodec.checkpoint.report import Report, TensorReport
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.checkpoint.source_files import SourceFiles, SpanCheck
from statecodec.codecs import Codec, EncodedTensor
from statecodec.codecs.chunking import Chunk, iterate
from statecodec.errors import UsageError
from statecodec.files import FileBytes, read_exactly
from statecodec.layouts import Moments, Region, Source, locate
from statecodec.layouts.tree import tree
from statecodec.names import shown


@dataclass(frozen=True)
class SourceItem(TensorInfo):
    """A tensor to store: a region of a source file, or (`region` is None) all of that file that no region covers."""

    file: int = 0
    region: Region | None = None

    @property
    def bytes_only(self) -> bool:
        """It may only be stored bit for bit: no tensor, or several different windows look at it."""
        return self.region is None or self.region.lossless


class SourceCheckpoint(Checkpoint):
    """An uncompressed checkpoint. Files are opened when first read, and must be those that were located.

    `crcs`: whether a zip record's CRC-32 is checked before numbers are taken from it. Turn it off only where the whole
    file is checked anyway.
    """

    def __init__(self, path: str | Path, *, crcs: bool = True) -> None:
        """Locate the tensors. Raises LayoutError."""
        self.located: Source = locate(path)
        self.path: Path = self.located.root
        self.files = SourceFiles(self.located)
        self.notes = tuple(f"{shown(f.path)}: {f.note}" for f in self.located.files if f.note)
        self.skeletons = [Skeleton(f.nbytes, ((r.offset, r.nbytes) for r in f.regions)) for f in self.located.files]
        self.items: tuple[SourceItem, ...] = tuple(_items(self.located, self.skeletons))
        self._check = SpanCheck(self.located, self.files) if crcs else None

    @property
    def nbytes(self) -> int:
        """Bytes of all files, hard links counted once."""
        return sum(f.nbytes for f in self.located.files if f.same_as is None)

    @property
    def layout(self) -> str:
        """The name of the layout, as in reports."""
        return "directory" if self.located.is_directory else self.located.files[0].layout

    @cached_property
    def _regions(self) -> list[dict[str, int]]:
        """For every file: region name -> index of its item."""
        found: list[dict[str, int]] = [{} for _ in self.located.files]
        for item in self.items:
            if item.region is not None:
                found[item.file][item.region.name] = item.index
        return found

    @cached_property
    def _moments(self) -> list[tuple[Moments, ...]]:
        """The moments of every file, with the names of items instead of the layout's region names."""
        found = []
        for file, names in zip(self.located.files, self._regions, strict=True):
            named = {region: self.items[index].name for region, index in names.items()}
            found.append(tuple(
                replace(
                    m, exp_avg=named[m.exp_avg], exp_avg_sq=named[m.exp_avg_sq],
                    weight=named[m.weight] if m.weight else None,
                )
                for m in file.moments
            ))  # fmt: skip
        return found

    @property
    def moments(self) -> tuple[Moments, ...]:
        return tuple(m for group in self._moments for m in group)

    @property
    def listing(self) -> tuple[str, ...]:
        located = self.located
        return (*(f.path for f in located.files), *located.directories) if located.is_directory else ()

    @cached_property
    def places(self) -> Mapping[str, Place]:
        found = {}
        for file, names in zip(self.located.files, self._regions, strict=True):
            prefix = f"{shown(file.path)}:" if self.located.is_directory else ""
            indices = [names[region.name] for region in file.regions]
            for view in file.views:
                found[prefix + view.name] = Place(view, indices[view.region])
        return found

    def chunk(self, item: SourceItem, chunk: Chunk, scratch: Scratch | None = None) -> Tensor:
        """Elements of an item, in the chunk's shape; in the thread's scratch memory if given. Thread-safe."""
        if self._check is not None and item.region is not None:
            self._check.range(item.file, item.region.offset, item.region.offset + item.region.nbytes)
        size = item.dtype.itemsize
        shape, dtype = tuple(chunk.shape), item.dtype
        values = scratch.take("source", dtype, shape) if scratch else torch.empty(shape, dtype=dtype, device="cpu")
        view = memory(values)
        with self.files.open(item.file) as fd:
            name = str(self.files.path(item.file))
            if item.region is not None:
                read_exactly(fd, item.region.offset + chunk.start * size, view, name)
                return values
            done = 0
            for offset, length in self.skeletons[item.file].pieces(chunk.start, chunk.stop):
                read_exactly(fd, offset, view[done : done + length], name)
                done += length
        return values

    def stream(self, tensor: TensorInfo) -> Iterator[Tensor]:
        item = self.items[tensor.index]
        for chunk in iterate(codecs.Raw(), item.shape, item.dtype):
            yield self.chunk(item, chunk).reshape(-1)

    def decode(self, index: int) -> Tensor:
        item = self.items[index]
        return self.chunk(item, Chunk(0, item.numel, item.shape))

    def codec(self, index: int) -> Codec:
        return codecs.Raw()

    def encoded(self, index: int) -> EncodedTensor:
        raise UsageError(f"{self.path} is not compressed: it holds no encoded tensors")

    def report(self) -> Report:
        tensors = tuple(
            TensorReport(
                name=item.name, role=item.role, param=item.param, shape=item.shape,
                dtype=str(item.dtype).removeprefix("torch."), codec="raw",
                bytes_before=item.nbytes, bytes_after=item.nbytes,
            )
            for item in self.items
        )  # fmt: skip
        return Report(
            path=str(self.path), format_version=None, bytes=self.nbytes, tensors=tensors, seconds=0.0, notes=self.notes,
            source={"name": self.path.name, "layout": self.layout, "bytes": self.nbytes, "sha256": None},
            files=tuple(f.path for f in self.located.files),
        )  # fmt: skip

    def load(self, device: torch.device | str = "cpu") -> Any:
        if not self.located.is_directory:
            return self._load_file(0, device)
        return {f.path: self._load_file(i, device) for i, f in enumerate(self.located.files)}

    def _load_file(self, file: int, device: torch.device | str) -> Any:
        if self._check is not None:
            self._check.whole(file)
        with self.files.open(file) as fd:
            name = str(self.files.path(file))

            def read(offset: int, nbytes: int) -> Tensor:
                out = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
                read_exactly(fd, offset, memory(out), name)
                return out.to(device)

            content = FileBytes(fd, self.files.path(file).name)
            if self.located.files[file].layout == "opaque":
                return content.read(0, content.size)
            return tree(content, read)

    def stored_files(self, digests: Sequence[str | None]) -> tuple[StoredFile, ...]:
        """The files as a document describes them; `digests`: hex SHA-256 of each, or None."""
        regions: list[list[tuple[int, int]]] = [[] for _ in self.located.files]
        skeleton: list[int | None] = [None] * len(self.located.files)
        for item in self.items:
            if item.region is None:
                skeleton[item.file] = item.index
            else:
                regions[item.file].append((item.region.offset, item.index))
        return tuple(
            StoredFile(
                path=f.path, nbytes=f.nbytes, mode=f.mode, layout=f.layout, sha256=digest, regions=tuple(regions[i]),
                skeleton=skeleton[i], views=f.views, crcs=f.crcs, moments=self._moments[i], same_as=f.same_as,
                note=f.note, mtime_ns=f.identity.mtime_ns,
            )
            for i, (f, digest) in enumerate(zip(self.located.files, digests, strict=True))
        )  # fmt: skip

    def close(self) -> None:
        self.files.close()


def _items(source: Source, skeletons: Sequence[Skeleton]) -> Iterator[SourceItem]:
    """What will be stored, in order: of each file its skeleton, then its regions."""
    taken: dict[str, int] = {}
    index = 0
    for number, (file, skeleton) in enumerate(zip(source.files, skeletons, strict=True)):
        if file.same_as is not None:
            continue
        prefix = f"{shown(file.path)}:" if source.is_directory else ""
        if skeleton.nbytes:
            role = "skeleton" if file.regions else "file"
            name = _unique(prefix + role, taken)
            yield SourceItem(name, role, None, (skeleton.nbytes,), torch.uint8, index, number)
            index += 1
        for region in file.regions:
            name = _unique(prefix + region.name, taken)
            yield SourceItem(name, region.role, region.param, region.shape, region.dtype, index, number, region)
            index += 1


def _unique(name: str, taken: dict[str, int]) -> str:
    """A stored name that nobody has: tensors may be called anything, and part names append `/part`."""
    base = name.replace("/", "|") or "tensor"
    base = f"tensor.{base}" if base.startswith("__") else base
    candidate = base
    while candidate in taken:
        taken[base] += 1
        candidate = f"{base}~{taken[base]}"
    taken[candidate] = 1
    return candidate
