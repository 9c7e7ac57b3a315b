"""An open uncompressed checkpoint: located once, read chunk by chunk, and watched for changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statecodec import codecs
from statecodec.buffers import ThreadScratch, memory
from statecodec.checkpoint.base import Checkpoint, TensorInfo, Window
from statecodec.checkpoint.joined import NamedTensor
from statecodec.checkpoint.report import Report, TensorReport
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.checkpoint.source_files import SourceFiles, SpanCheck
from statecodec.checkpoint.source_items import SourceItem, source_items
from statecodec.checkpoint.states import encoded_state, to_json
from statecodec.checkpoint.stored_files import StoredFile
from statecodec.codecs import EncodedTensor, Encoding
from statecodec.codecs.chunking import Chunk, iterate
from statecodec.errors import UsageError
from statecodec.files import FileBytes, read_exactly, will_need
from statecodec.layouts import (
    Box,
    ListedFile,
    Listing,
    LogicalTensor,
    Moments,
    Momentum,
    QuantisedMoments,
    Run,
    Source,
    locate,
)
from statecodec.layouts.payload import MEMORY, Payload, Room
from statecodec.layouts.tree import tree
from statecodec.lazy import torch
from statecodec.names import shown

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 16 << 20  # bytes


class SourceCheckpoint(Checkpoint):
    """An uncompressed checkpoint. Files are opened when first read, and must be those that were located.

    Args:
        path: The file or directory.
        crcs: Check a zip record's CRC-32 before numbers are taken from it. Turn it off only where the whole file is
            checked anyway.

    Raises:
        LayoutError: If the tensors cannot be located.
    """

    on_disk = True
    """Whether the files hold what `chunk` gives."""

    def __init__(self, path: str | Path, *, crcs: bool = True) -> None:
        """Locate the tensors. Raises LayoutError."""
        self.located: Source = locate(path)
        self.path: Path = self.located.root
        self.files = SourceFiles(self.located)
        self.notes = tuple(f"{shown(f.path)}: {f.note}" for f in self.located.files if f.note)
        self.skeletons = [Skeleton(f.nbytes, ((r.offset, r.nbytes) for r in f.regions)) for f in self.located.files]
        self.items: tuple[SourceItem, ...] = tuple(source_items(self.located, self.skeletons))
        self._check = SpanCheck(self.located, self.files) if crcs else None

    @property
    def nbytes(self) -> int:
        """Bytes of all files, hard links counted once."""
        return sum(f.nbytes for f in self.located.files if f.same_as is None)

    @property
    def own_files(self) -> list[int]:
        """The numbers of the files that are stored: those that are not hard links to another one."""
        return [i for i, f in enumerate(self.located.files) if f.same_as is None]

    @property
    def layout(self) -> str:
        """The name of the layout, as in reports."""
        return "directory" if self.located.is_directory else self.located.files[0].layout

    @property
    def kind(self) -> dict[str, str]:
        """The layout, and the framework where one is recognised, as in reports and documents."""
        framework = self.located.framework
        return {"layout": self.layout, **({} if framework is None else {"framework": framework})}

    @cached_property
    def _stored(self) -> Mapping[str, list[tuple[Box | Run | None, str]]]:
        """Name of a located tensor -> its parts, and the names of the items that they are stored as."""
        numbers = {file.path: i for i, file in enumerate(self.located.files)}
        return {
            tensor.name: [(p.part, self.items[self._regions[numbers[p.file]][p.region]].name) for p in tensor.pieces]
            for tensor in self.located.tensors
        }

    @cached_property
    def _regions(self) -> list[list[int]]:
        """For every file the indices of its regions' items."""
        by_file: list[list[int]] = [[] for _ in self.located.files]
        for item in self.items:
            if item.region is not None:
                by_file[item.file].append(item.index)
        return by_file

    @cached_property
    def joined(self) -> Mapping[str, NamedTensor]:
        return {
            tensor.name: NamedTensor(tensor.name, tensor.dtype, tensor.shape, tuple(self._several(tensor)))
            for tensor in self.located.tensors
            if len(tensor.pieces) > 1
        }

    def _several(self, tensor: LogicalTensor) -> Iterator[tuple[int, Box | Run]]:
        for part, name in self._stored[tensor.name]:
            assert part is not None  # a part is None only if it is the only one
            yield self.tensors[name].index, part

    @cached_property
    def moments(self) -> tuple[Moments, ...]:
        return tuple(m for located in self.located.moments for m in self._by_piece(located))

    def _by_piece(self, moments: Moments) -> Iterator[Moments]:
        """The same moments with the names of items: once for each piece, where all of them are cut alike."""
        first, second = self._stored[moments.exp_avg], self._stored[moments.exp_avg_sq]
        weight = self._stored[moments.weight] if moments.weight else []
        if [part for part, _ in first] != [part for part, _ in second]:
            return
        fits = [part for part, _ in weight] == [part for part, _ in first]
        for number, ((_, m), (_, v)) in enumerate(zip(first, second, strict=True)):
            yield replace(moments, exp_avg=m, exp_avg_sq=v, weight=weight[number][1] if fits else None)

    @cached_property
    def momenta(self) -> tuple[Momentum, ...]:
        return tuple(
            replace(single, momentum=m, weight=w)
            for single in self.located.momenta
            for (of_m, m), (of_w, w) in zip(self._stored[single.momentum], self._stored[single.weight], strict=False)
            if of_m == of_w
        )

    @cached_property
    def quantised(self) -> tuple[QuantisedMoments, ...]:
        return tuple(m.renamed(lambda name: self._stored[name][0][1]) for m in self.located.quantised)

    @property
    def listing(self) -> tuple[str, ...]:
        located = self.located
        return (*(f.path for f in located.files), *located.directories) if located.is_directory else ()

    @cached_property
    def windows(self) -> Mapping[str, Window]:
        windows = {}
        for file, indices in zip(self.located.files, self._regions, strict=True):
            prefix = f"{shown(file.path)}:" if self.located.is_directory else ""
            for view in file.views:
                windows[prefix + view.name] = Window(view, indices[view.region])
        return windows

    def chunk(self, item: SourceItem, chunk: Chunk, scratch: ThreadScratch | None = None, name: str = "") -> Tensor:
        """Read elements of an item. Thread-safe.

        Args:
            item: The item.
            chunk: Which elements, and their shape.
            scratch: The thread's scratch memory, for the result to lie in.
            name: The name of the buffer in it.

        Returns:
            The elements in the chunk's shape, in scratch memory if there is any.
        """
        return self.chunk_with_memory(item, chunk, scratch, name)[0]

    def chunk_with_memory(
        self, item: SourceItem, chunk: Chunk, scratch: ThreadScratch | None = None, name: str = ""
    ) -> tuple[Tensor, memoryview]:
        """The same, and the memory that the elements lie in."""
        shape, dtype = tuple(chunk.shape), item.dtype.torch
        if scratch is not None:
            values, data = scratch.take_with_memory("source", dtype, shape, name)
        else:
            values = torch.empty(shape, dtype=dtype, device="cpu")
            data = memory(values)
        self._read(item, chunk.start, data)
        return values, data

    def sample(self, item: SourceItem, starts: Sequence[int], numel: int, scratch: ThreadScratch) -> Tensor:
        """Read elements of an item from several places. Thread-safe.

        Args:
            item: The item, a tensor.
            starts: The first element of each piece.
            numel: How many elements a piece has.
            scratch: The thread's scratch memory, for the result to lie in.

        Returns:
            The pieces, one a row.
        """
        values, data = scratch.take_with_memory("source", item.dtype.torch, (len(starts), numel))
        nbytes = numel * item.dtype.itemsize
        if item.region is not None:
            with self.files.open(item.file) as fd:
                will_need(fd, [item.region.offset + start * item.dtype.itemsize for start in starts], nbytes)
        for row, start in enumerate(starts):
            self._read(item, start, data[row * nbytes : (row + 1) * nbytes])
        return values

    def _read(self, item: SourceItem, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of an item from an element on."""
        with self.files.open(item.file) as fd:
            path = str(self.files.path(item.file))
            if item.region is not None:
                if self._check is not None:
                    self._check.range(item.file, item.region.offset, item.region.offset + item.region.nbytes)
                read_exactly(fd, item.region.offset + start * item.dtype.itemsize, view, path)
                return
            done = 0
            for offset, length in self.skeletons[item.file].pieces(start, start + len(view)):
                read_exactly(fd, offset, view[done : done + length], path)
                done += length

    def stream(self, tensor: TensorInfo) -> Iterator[Tensor]:
        item = self.items[tensor.index]
        for chunk in iterate(codecs.Raw(), item.shape, item.dtype):
            yield self.chunk(item, chunk).reshape(-1)

    def elements(self, tensor: TensorInfo, start: int, stop: int) -> Tensor:
        return self.chunk(self.items[tensor.index], Chunk(start, stop, (stop - start,)))

    def decode(self, index: int) -> Tensor:
        item = self.items[index]
        return self.chunk(item, Chunk(0, item.numel, item.shape))

    def stored_as(self, index: int) -> Encoding:
        return Encoding(codecs.Raw())

    def encoded(self, index: int) -> EncodedTensor:
        raise UsageError(f"{self.path} is not compressed: it holds no encoded tensors")

    def report(self) -> Report:
        tensors = tuple(
            TensorReport(
                name=item.name,
                role=item.role,
                param=item.param,
                shape=item.shape,
                dtype=item.dtype.name,
                codec="raw",
                bytes_before=item.nbytes,
                bytes_after=item.nbytes,
                state=None
                if item.state is None
                else encoded_state(to_json(item.state), item.name, item.shape, item.dtype),
            )
            for item in self.items
        )
        return Report(
            path=str(self.path),
            format_version=None,
            bytes=self.nbytes,
            tensors=tensors,
            seconds=0.0,
            notes=self.notes,
            source={"name": self.path.name, **self.kind, "bytes": self.nbytes, "sha256": None},
            files=tuple(f.path for f in self.located.files),
        )

    def original_listing(self, *, crcs: bool = True) -> Listing:
        """The files, as they were when they were located. `crcs`: all of a file is checked when it is opened."""
        located = self.located
        files = {
            f.path: ListedFile(f.path, f.nbytes, partial(self._opened, i, crcs), layout=f.layout)
            for i, f in enumerate(located.files)
            if f.same_as is None
        }
        same_as = {f.path: f.same_as for f in located.files if f.same_as is not None}
        return Listing(files, located.is_directory, located.folders, same_as)

    def load(self, device: torch.device | str = "cpu", room: Room = MEMORY) -> Any:
        numbers = {f.path: i for i, f in enumerate(self.located.files)}

        def fill(path: str, offset: int, out: Tensor) -> Iterator[int]:
            view = memory(out)
            with self.files.open(numbers[path]) as fd:
                for at in range(0, len(view), _PIECE):
                    read_exactly(fd, offset + at, view[at : at + _PIECE], path)
                    yield len(view[at : at + _PIECE])

        return tree(self.original_listing(), Payload(fill, room, torch.device(device)))

    @contextmanager
    def _opened(self, file: int, crcs: bool) -> Iterator[FileBytes]:
        if crcs and self._check is not None:
            self._check.whole(file)
        with self.files.open(file) as fd:
            yield FileBytes(fd, self.files.path(file).name)

    def stored_files(self, digests: Sequence[str | None]) -> tuple[StoredFile, ...]:
        """The files as a document describes them; `digests`: hex SHA-256 of each, or None."""
        regions: list[list[tuple[int, int]]] = [[] for _ in self.located.files]
        skeleton: list[int | None] = [None] * len(self.located.files)
        moments: list[list[Moments]] = [[] for _ in self.located.files]
        for pair in self.moments:
            moments[self.items[self.tensors[pair.exp_avg].index].file].append(pair)
        for item in self.items:
            if item.region is None:
                skeleton[item.file] = item.index
            else:
                regions[item.file].append((item.region.offset, item.index))
        return tuple(
            StoredFile(
                path=f.path,
                nbytes=f.nbytes,
                mode=f.mode,
                layout=f.layout,
                sha256=digest,
                regions=tuple(regions[i]),
                skeleton=skeleton[i],
                views=f.views,
                crcs=f.crcs,
                moments=tuple(moments[i]),
                same_as=f.same_as,
                note=f.note,
                mtime_ns=f.identity.mtime_ns,
            )
            for i, (f, digest) in enumerate(zip(self.located.files, digests, strict=True))
        )

    def close(self) -> None:
        self.files.close()
