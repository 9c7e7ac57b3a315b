"""The bytes of an original file, decoded on demand from a compressed checkpoint, and the object they hold."""

from __future__ import annotations

from bisect import bisect_right
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from statecodec.checkpoint.base import Keep, unchanged
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.checkpoint.stored import Stored
from statecodec.checkpoint.stored_files import StoredFile
from statecodec.errors import FormatError, LayoutError, MalformedCheckpoint
from statecodec.files import ByteSource
from statecodec.layouts import ListedFile, Listing, opaque, tree
from statecodec.layouts.registry import LAYOUTS
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def load_files(stored: Stored, device: torch.device | str, keep: Keep = unchanged) -> Any:
    """The object that the original file holds; of a directory {path: object}. Raises FormatError."""
    document = stored.document
    unknown = {f.layout for f in document.files} - {opaque.name, *(layout.name for layout in LAYOUTS)}
    if unknown:
        raise FormatError(
            f"{stored.path}: the layout {min(unknown)!r} is not known here; `restore` gives the original, a newer "
            "statecodec loads it"
        )
    files = {f.path: ListedFile(f.path, f.nbytes, partial(_opened, stored, f), layout=f.layout)
             for f in document.files if f.same_as is None}  # fmt: skip
    same_as = {f.path: f.same_as for f in document.files if f.same_as is not None}
    listing = Listing(files, document.is_directory, document.folders, same_as)

    def read(path: str, offset: int, nbytes: int) -> Tensor:
        if torch.device(device).type == "meta":  # no numbers are asked for
            return torch.empty(nbytes, dtype=torch.uint8, device="meta")
        with files[path].open() as content:
            assert isinstance(content, _RestoredBytes)
            return keep(content.tensor(offset, nbytes).to(device))

    try:
        return tree(listing, read)
    except LayoutError as error:
        raise FormatError(f"{stored.path}: what is stored beside the tensors is no checkpoint: {error}") from error


def _opened(stored: Stored, file: StoredFile) -> AbstractContextManager[ByteSource]:
    return nullcontext(_RestoredBytes(stored, file))


class _RestoredBytes:
    """The bytes of the file as `restore` would write it, decoded on demand."""

    def __init__(self, stored: Stored, file: StoredFile) -> None:
        items = stored.reader.items
        self.stored, self.file, self.size = stored, file, file.nbytes
        self._regions = [(offset, items[i].decoded_nbytes, i) for offset, i in file.regions]
        self._skeleton = Skeleton(file.nbytes, ((o, n) for o, n, _ in self._regions))
        self._starts = [r[0] for r in self._regions]
        self._bytes = stored.decode(file.skeleton).numpy() if file.skeleton is not None else None

    def read(self, offset: int, nbytes: int) -> bytes:
        """A range of the file, as bytes."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise MalformedCheckpoint(f"needs bytes {offset}..{offset + nbytes} but the file has {self.size}")
        return self.tensor(offset, nbytes).numpy().tobytes()

    def tensor(self, offset: int, nbytes: int) -> Tensor:
        """A range of the file, as a fresh 1-D uint8 tensor."""
        first = max(bisect_right(self._starts, offset) - 1, 0)
        if self._regions and self._regions[first][:2] == (offset, nbytes):
            return self.stored.decode(self._regions[first][2]).reshape(-1).view(torch.uint8)
        out = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        for index in range(first, len(self._regions)):
            start, length, item = self._regions[index]
            if start >= offset + nbytes:
                break
            low, high = max(start, offset), min(start + length, offset + nbytes)
            if low < high:
                data = self.stored.decode(item).reshape(-1).view(torch.uint8)
                out[low - offset : high - offset] = data[low - start : high - start]
        for low, length in self._skeleton.within(offset, offset + nbytes):
            assert self._bytes is not None
            at = self._skeleton.position(low)
            out.numpy()[low - offset : low - offset + length] = self._bytes[at : at + length]
        return out
