"""The bytes of an original file, decoded on demand from a compressed checkpoint, and the object they hold."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from statecodec.buffers import Bytes
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.checkpoint.stored_files import StoredFile
from statecodec.errors import FormatError, LayoutError, MalformedCheckpoint
from statecodec.files import ByteSource
from statecodec.layouts import ListedFile, Listing, opaque, tree
from statecodec.layouts.payload import MEMORY, Payload, Room
from statecodec.layouts.registry import LAYOUTS
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_HELD = 4  # chunks


def original_listing(stored: StoredCheckpoint) -> Listing:
    """The files of the original, whose bytes are decoded when they are read; empty for what `save` wrote."""
    document = stored.document
    files = {f.path: ListedFile(f.path, f.nbytes, partial(_opened, stored, f), layout=f.layout)
             for f in document.files if f.same_as is None}  # fmt: skip
    same_as = {f.path: f.same_as for f in document.files if f.same_as is not None}
    return Listing(files, document.is_directory, document.folders, same_as)


def load_files(stored: StoredCheckpoint, device: torch.device | str, room: Room = MEMORY) -> Any:
    """The object that the original file holds; of a directory {path: object}. Raises FormatError."""
    document = stored.document
    unknown = {f.layout for f in document.files} - {opaque.name, *(layout.name for layout in LAYOUTS)}
    if unknown:
        raise FormatError(
            f"{stored.path}: the layout {min(unknown)!r} is not known here; `restore` gives the original, a newer "
            "statecodec loads it"
        )
    listing = original_listing(stored)

    def fill(path: str, offset: int, out: Tensor) -> Iterator[int]:
        with listing.files[path].open() as content:
            assert isinstance(content, _RestoredBytes)
            yield from content.fill(offset, out)

    try:
        return tree(listing, Payload(fill, room, torch.device(device)))
    except LayoutError as error:
        raise FormatError(f"{stored.path}: what is stored beside the tensors is no checkpoint: {error}") from error


def _opened(stored: StoredCheckpoint, file: StoredFile) -> AbstractContextManager[ByteSource]:
    return nullcontext(_RestoredBytes(stored, file))


class _RestoredBytes:
    """The bytes of the file as `restore` would write it, decoded on demand."""

    def __init__(self, stored: StoredCheckpoint, file: StoredFile) -> None:
        items = stored.reader.items
        self.stored, self.file, self.size = stored, file, file.nbytes
        self._regions = [(offset, items[i].decoded_nbytes, i) for offset, i in file.regions]
        self._skeleton = Skeleton(file.nbytes, ((o, n) for o, n, _ in self._regions))
        self._starts = [r[0] for r in self._regions]
        self._held: OrderedDict[int, Bytes] = OrderedDict()

    def read(self, offset: int, nbytes: int) -> bytes:
        """A range of the file, as bytes."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise MalformedCheckpoint(f"needs bytes {offset}..{offset + nbytes} but the file has {self.size}")
        return self._bytes(offset, nbytes).tobytes()

    def fill(self, offset: int, out: Tensor) -> Iterator[int]:
        """Decode a range of the file into 1-D uint8 memory; gives the number of bytes of each piece as it is there."""
        first = max(bisect_right(self._starts, offset) - 1, 0)
        if self._regions and self._regions[first][:2] == (offset, out.numel()):
            item = self._regions[first][2]
            yield from self.stored.decode_into(item, out.view(self.stored.items[item].dtype.torch))
        else:
            self._copy(offset, out.numpy())
            yield out.numel()

    def _bytes(self, offset: int, nbytes: int) -> Bytes:
        out = np.empty(nbytes, np.uint8)
        self._copy(offset, out)
        return out

    def _copy(self, offset: int, out: Bytes) -> None:
        """Decode a range of the file; torch is not needed as long as no region has a part in it."""
        stop = offset + len(out)
        first = max(bisect_right(self._starts, offset) - 1, 0)
        for index in range(first, len(self._regions)):
            start, length, item = self._regions[index]
            if start >= stop:
                break
            low, high = max(start, offset), min(start + length, stop)
            if low < high:
                size = self.stored.items[item].dtype.itemsize
                first_element = (low - start) // size
                data = self.stored.decode_range(item, first_element, -(-(high - start) // size)).view(torch.uint8)
                skip = low - start - first_element * size
                out[low - offset : high - offset] = data[skip : skip + high - low].numpy()
        for low, length in self._skeleton.within(offset, stop):
            self._copy_skeleton(self._skeleton.position(low), out[low - offset : low - offset + length])

    def _copy_skeleton(self, start: int, out: Bytes) -> None:
        """Skeleton bytes from `start` on; only the chunks that they are in are decoded."""
        assert self.file.skeleton is not None
        chunks, stop = self.stored.reader.items[self.file.skeleton].chunks, start + len(out)
        for number in range(bisect_right(chunks, start, key=lambda c: c.start) - 1, len(chunks)):
            chunk = chunks[number]
            if chunk.start >= stop:
                break
            low, high = max(chunk.start, start), min(chunk.stop, stop)
            out[low - start : high - start] = self._skeleton_chunk(number)[low - chunk.start : high - chunk.start]

    def _skeleton_chunk(self, number: int) -> Bytes:
        """One chunk of the skeleton. The last few are kept, because headers are read piece by piece."""
        assert self.file.skeleton is not None
        if number not in self._held:
            self._held[number] = self.stored.chunk_bytes(self.file.skeleton, number)
        self._held.move_to_end(number)
        if len(self._held) > _HELD:
            self._held.popitem(last=False)
        return self._held[number]
