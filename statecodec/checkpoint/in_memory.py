"""A checkpoint in memory, seen as the torch.save file that it would become.

What is not a tensor goes to a small sparse file; the tensors stay where they are.
"""

from __future__ import annotations

import os
import pickle
import struct
import tempfile
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zlib_ng import zlib_ng

from statecodec.buffers import memory
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.errors import UsageError
from statecodec.files import FileBytes, write_exactly
from statecodec.layouts.torch_zip import open_archive
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1 << 16  # bytes of storages that are written: settings and counters are read from there
_PIECE = 1 << 24


class MemoryCheckpoint(SourceCheckpoint):
    """The torch.save file of an object. Its tensors are read from the object's memory and must not change meanwhile.

    Restoring it gives what torch.save would have written, with every checksum. One thing differs: the random-looking
    text in `.data/serialization_id`, which torch derives from the checksums that it computes.
    """

    on_disk = False

    def __init__(self, value: Any, name: str) -> None:
        """Raises UsageError for what torch.save does not take."""
        self._folder = tempfile.TemporaryDirectory(prefix="statecodec-")
        try:
            path = Path(self._folder.name) / name
            self._storages = _written(value, path)
            self._offsets = [offset for offset, _ in self._storages]
            super().__init__(path, crcs=False)
        except BaseException:
            self._folder.cleanup()
            raise

    def _read(self, item: SourceItem, start: int, view: memoryview) -> None:
        if item.region is None:
            super()._read(item, start, view)
        elif len(view):
            offset, storage = self._storages[bisect_right(self._offsets, item.region.offset) - 1]
            first = item.region.offset - offset + start * item.dtype.itemsize
            torch.frombuffer(view, dtype=torch.uint8).copy_(storage[first : first + len(view)])

    def close(self) -> None:
        super().close()
        self._folder.cleanup()


def _written(value: Any, path: Path) -> list[tuple[int, Tensor]]:
    """Write the torch.save file without the bytes of large tensors.

    Returns every storage's offset in the file, and the storage as bytes.
    """
    finder = _Storages()
    try:
        finder.dump(value)
        with torch.serialization.skip_data():
            torch.save(value, path)
    except (
        pickle.PicklingError,
        TypeError,
        AttributeError,
        RuntimeError,
        NotImplementedError,
        RecursionError,
    ) as error:
        raise UsageError(f"torch.save does not take this object: {str(error).splitlines()[0]}") from error
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        entries = open_archive(FileBytes(fd, path.name), path.name).storages
        locations = {}
        for number, (key, storage) in enumerate(finder.storages.items()):
            entry = entries.get(str(number))
            if entry is None or entry.nbytes != storage.numel() or len(entries) != len(finder.storages):
                raise UsageError("the object changed while it was being saved, or gives something else each time")
            locations[key] = (entry.offset, storage)
            _fill(fd, entry.offset, storage if entry.nbytes <= _SMALL else storage[:0])
            crc = struct.pack("<I", _crc32(storage))
            for at in entry.crc_at:
                write_exactly(fd, at, memoryview(crc))
        for key, start, nbytes in finder.scalars:
            if key in locations:
                offset, storage = locations[key]
                _fill(fd, offset + start, storage[start : start + nbytes])
    finally:
        os.close(fd)
    return sorted(locations.values(), key=lambda location: location[0])


def _fill(fd: int, offset: int, data: Tensor) -> None:
    write_exactly(fd, offset, memory(data.to("cpu")))


def _crc32(storage: Tensor) -> int:
    value = 0
    for start in range(0, storage.numel(), _PIECE):
        value = zlib_ng.crc32(memory(storage[start : start + _PIECE].to("cpu")), value)
    return value


class _Storages(pickle.Pickler):
    """Finds the storages of an object in the order in which torch.save numbers them, and its one-element tensors."""

    def __init__(self) -> None:
        super().__init__(_Nowhere(), protocol=2)  # the protocol of torch.save
        self.storages: dict[int, Tensor] = {}
        """Each storage as bytes, by its identity."""
        self.scalars: list[tuple[int, int, int]] = []
        """Identity of the storage, first byte, bytes."""

    def persistent_id(self, obj: Any) -> Any:
        """Called for every object: the storages are not pickled."""
        storage = obj._untyped_storage if isinstance(obj, torch.storage.TypedStorage) else obj
        if not torch.is_storage(storage):
            return None
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return "storage"

    def reducer_override(self, obj: Any) -> Any:
        """Called for every object that pickle reduces; leaves it to do so."""
        if isinstance(obj, torch.Tensor) and obj.numel() == 1 and obj.layout == torch.strided and not obj.is_meta:
            size = obj.element_size()
            self.scalars.append((obj.untyped_storage()._cdata, int(obj.storage_offset()) * size, size))
        return NotImplemented


class _Nowhere:
    """A file that discards what is written."""

    def write(self, data: Any) -> int:
        return len(data)
