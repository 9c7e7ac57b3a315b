"""The skeleton of a file: the bytes that no region covers, seen as one string."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate


class Skeleton:
    """The gaps between a file's regions, in order: `pieces` maps a range of the joined gaps to ranges of the file."""

    def __init__(self, file_bytes: int, regions: Iterable[tuple[int, int]]) -> None:
        """`regions`: (offset, nbytes), disjoint and by offset."""
        gaps: list[tuple[int, int]] = []
        end = 0
        for offset, nbytes in regions:
            if offset > end:
                gaps.append((end, offset - end))
            end = offset + nbytes
        if file_bytes > end:
            gaps.append((end, file_bytes - end))
        self.gaps = gaps
        self._starts = [0, *accumulate(length for _, length in gaps)]

    @property
    def nbytes(self) -> int:
        """Number of skeleton bytes."""
        return self._starts[-1]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(file offset, length) of the file ranges that skeleton bytes start..stop come from, in order."""
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            offset, length = self.gaps[index]
            skip = start - self._starts[index]
            take = min(length - skip, stop - start)
            yield offset + skip, take
            start += take
            index += 1

    def position(self, offset: int) -> int:
        """The position in the joined gaps of the skeleton byte at a file offset inside a gap."""
        index = bisect_right(self.gaps, (offset, 1 << 62)) - 1
        return self._starts[index] + offset - self.gaps[index][0]

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(file offset, length) of the parts of file range start..stop that belong to the skeleton."""
        first = max(bisect_right(self.gaps, (start, 1 << 62)) - 1, 0)
        for index in range(first, len(self.gaps)):
            offset, length = self.gaps[index]
            if offset >= stop:
                break
            low, high = max(offset, start), min(offset + length, stop)
            if low < high:
                yield low, high - low
