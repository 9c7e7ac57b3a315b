"""Reading an uncompressed checkpoint chunk by chunk."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from statecodec.choose.plan import Plan, PlannedItem
from statecodec.codecs import PartSpec
from statecodec.codecs.chunking import Chunk
from statecodec.errors import LayoutError
from statecodec.layouts import Source
from statecodec.streams import Scratch, memory, read_exactly


class SourceFiles:
    """Chunks of the source's items as tensors, and whether its files stayed as they were."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._stamps = [_stamp(self.path(i)) for i in range(len(source.files))]

    def path(self, file: int) -> Path:
        """Where a source file is."""
        return self.source.root / self.source.files[file].path if self.source.is_directory else self.source.root

    def read(self, plan: Plan, planned: PlannedItem, chunk: Chunk, scratch: Scratch | None = None) -> Tensor:
        """The chunk's elements, in its shape; in the thread's scratch memory if given."""
        item = planned.item
        size = item.dtype.itemsize
        spec = PartSpec(item.dtype, tuple(chunk.shape))
        values = scratch.take("source", spec) if scratch else torch.empty(spec.shape, dtype=spec.dtype)
        view = memory(values)
        path = self.path(planned.file)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if planned.region is not None:
                read_exactly(fd, planned.region.offset + chunk.start * size, view, str(path))
            else:
                done = 0
                for offset, length in plan.skeletons[planned.file].pieces(chunk.start, chunk.stop):
                    read_exactly(fd, offset, view[done : done + length], str(path))
                    done += length
        finally:
            os.close(fd)
        return values

    def read_all(self, plan: Plan, planned: PlannedItem) -> Tensor:
        """All of an item, in its own shape."""
        return self.read(plan, planned, Chunk(0, math.prod(planned.item.shape), planned.item.shape))

    def check_unchanged(self) -> None:
        """Raise LayoutError if a file was written to while it was read."""
        for file, stamp in enumerate(self._stamps):
            if _stamp(self.path(file)) != stamp:
                raise LayoutError(
                    f"{self.path(file)} changed while it was being compressed; try again once it is complete"
                )


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
