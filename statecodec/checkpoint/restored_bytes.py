"""The bytes of an original file, decoded on demand from a compressed checkpoint, and the object they hold."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor

from statecodec.checkpoint.document import StoredFile
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.checkpoint.stored import Stored
from statecodec.errors import FormatError, MalformedCheckpoint
from statecodec.layouts.tree import tree


def load_files(stored: Stored, device: torch.device | str) -> Any:
    """The object that the original file holds; of a directory {path: object}. Raises FormatError."""
    document = stored.document
    if not document.is_directory:
        return _load_file(stored, document.files[0], device)
    files = {f.path: f for f in document.files}
    return {f.path: _load_file(stored, files[f.same_as] if f.same_as else f, device) for f in document.files}


def _load_file(stored: Stored, file: StoredFile, device: torch.device | str) -> Any:
    content = _RestoredBytes(stored, file)
    if file.layout == "opaque":
        return content.tensor(0, file.nbytes).numpy().tobytes()
    try:
        return tree(content, lambda offset, nbytes: content.tensor(offset, nbytes).to(device))
    except MalformedCheckpoint as error:
        raise FormatError(f"{stored.path}: the stored skeleton of {file.path} is not a checkpoint: {error}") from error


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
        for start, length, item in self._regions[first:]:
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
