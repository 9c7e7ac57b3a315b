"""Reads a source file once for two consumers: the encoder, which goes in order, and the hasher, which starts at byte 0.

The encoder lends each buffer that it has read. The hasher takes the buffer that comes next, and reads by itself what
was not lent. Neither can wait for the other for ever: where all buffers of a thread are still lent, the next chunk is
not lent but only noted, and what lies far behind the encoder will not be lent any more.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from contextlib import AbstractContextManager
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING

from statecodec.buffers import ThreadScratch
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.codecs.chunking import Chunk

if TYPE_CHECKING:
    from torch import Tensor

_SLOTS = 3  # buffers of a thread: one that it works on, and two that are hashed meanwhile
_BEHIND = 64 << 20  # bytes behind the furthest read from which on nothing is waited for: threads read out of order


class Loan:
    """Bytes of a file in a buffer of the encoder, valid until they are given back."""

    def __init__(self, start: int, data: memoryview) -> None:
        self.start, self.stop, self.data = start, start + len(data), data
        self.returned = False


class _Slots(threading.local):
    def __init__(self) -> None:
        self.loans: list[Loan | None] = [None] * _SLOTS


class SharedReads:
    """Lends what is read of a source's tensors. Thread-safe."""

    def __init__(self, source: SourceCheckpoint) -> None:
        self._source, self._slots = source, _Slots()
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, int, Loan]] = []
        """A heap of what the hasher has not passed yet: file, first byte, a number, loan."""
        self._numbers = count()
        self._furthest = (0, 0)  # file, byte
        self._closed = False
        self._regions: dict[int, tuple[list[int], list[int]]] = {}
        """File -> where its regions start and stop; only what lies in them is lent."""
        for item in source.items:
            if item.region is not None:
                starts, stops = self._regions.setdefault(item.file, ([], []))
                starts.append(item.region.offset)
                stops.append(item.region.offset + item.region.nbytes)

    def open(self, file: int) -> AbstractContextManager[int]:
        """A descriptor of a file, for what is not lent. Raises LayoutError if it is not the file that was located."""
        return self._source.files.open(file)

    def chunk_with_memory(self, item: SourceItem, chunk: Chunk, scratch: ThreadScratch) -> tuple[Tensor, memoryview]:
        """Elements of an item as `SourceCheckpoint` gives them; they must not be changed."""
        if item.region is None:
            return self._source.chunk_with_memory(item, chunk, scratch)
        slots = self._slots.loans
        free = next((k for k, loan in enumerate(slots) if loan is None or loan.returned), None)
        values, data = self._source.chunk_with_memory(item, chunk, scratch, "" if free is None else f"lent {free}")
        loan = Loan(item.region.offset + chunk.start * item.dtype.itemsize, data)
        if free is None:  # only noted: the hasher will read it again
            loan.returned, loan.data = True, memoryview(b"")
        else:
            slots[free] = loan
        with self._changed:
            heappush(self._waiting, (item.file, loan.start, next(self._numbers), loan))
            self._furthest = max(self._furthest, (item.file, loan.stop))
            self._changed.notify_all()
        return values, data

    def take(self, file: int, offset: int) -> Loan | int:
        """What was lent of a file from `offset` on; where nothing was, the byte up to which the caller must read.

        Waits for what is still to come. A loan has to be given back.
        """
        starts, stops = self._regions.get(file, ([], []))
        with self._changed:
            while True:
                while self._waiting and (self._waiting[0][0], self._waiting[0][3].stop) <= (file, offset):
                    heappop(self._waiting)[3].returned = True
                first = self._waiting[0][3] if self._waiting and self._waiting[0][0] == file else None
                if first is not None and first.start <= offset:
                    return first.stop if first.returned else first
                region = bisect_right(starts, offset) - 1
                if region < 0 or offset >= stops[region]:  # the offset lies between regions
                    return starts[region + 1] if region + 1 < len(starts) else self._source.located.files[file].nbytes
                if self._closed or self._furthest >= (file, offset + _BEHIND):
                    return stops[region] if first is None else first.start
                self._changed.wait()

    def give_back(self, loan: Loan) -> None:
        """The caller does not use the buffer any more."""
        loan.returned = True

    def close(self) -> None:
        """Lend nothing any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
