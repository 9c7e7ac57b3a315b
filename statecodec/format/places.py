"""Where records lie and which items they hold, which follows from their sizes and the order of items."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from statecodec.codecs.chunking import Chunk
from statecodec.errors import FormatError
from statecodec.format.items import PACKED, SHARED, DeclaredTensor, StoredChunk, StoredRecord, shares
from statecodec.limits import MAX_SHARED


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor that several items have in common, and its chunks."""

    tensor: DeclaredTensor
    chunks: Sequence[Chunk]
    sizes: Sequence[int]  # of each chunk's parts


class RecordTable:
    """Where records lie and which items they hold."""

    def __init__(
        self,
        of: Sequence[ChunkedTensor],
        shard_of: Sequence[int],
        sizes: Sequence[int],
        checksums: Sequence[str],
        shared: Sequence[tuple[int, int]],
    ) -> None:
        if len(checksums) != len(sizes) or any(size < 0 for size in sizes) or any(count < 1 for _, count in shared):
            raise FormatError("manifest: records: there is not one size and one checksum for each")
        self._of, self._sizes, self._checksums = of, sizes, checksums
        self._first: dict[int, int] = {}  # packed item -> its first record
        self._starts: list[int] = []  # of every record in its shard's entry
        self._shared: dict[int, tuple[StoredRecord, int]] = {}  # item -> its record, and its bytes of it
        self._packed = deque(i for i, form in enumerate(of) if form.tensor.storage == PACKED)
        self._small = deque(i for i, form in enumerate(of) if form.tensor.storage == SHARED)
        sharing, record, shard, start = dict(shared), 0, 0, 0
        while record < len(sizes):
            count = sharing.pop(record, 0)
            owners = self._owners(record, count)
            length = 1 if count else len(of[owners[0]].chunks)
            of_owners = sizes[record : record + length]
            if len(of_owners) != length or any(number in sharing for number in range(record, record + length)):
                raise FormatError(f"manifest: the records of item {owners[0]} do not follow each other")
            if not shard <= shard_of[owners[0]] == shard_of[owners[-1]]:
                raise FormatError(f"manifest: record {record} is not in the order of shards")
            if shard_of[owners[0]] > shard:
                shard, start = shard_of[owners[0]], 0
            self._starts.extend(start + before for before in [0, *accumulate(of_owners[:-1])])
            if count:
                self._share(StoredRecord(shard, start, of_owners[0], checksums[record], owners))
            else:
                self._first[owners[0]] = record
            record, start = record + length, start + sum(of_owners)
        if sharing or self._small or self._packed:
            raise FormatError("manifest: records: some items have none")

    def _owners(self, record: int, count: int) -> tuple[int, ...]:
        """The next items in order that a record belongs to.

        These are `count` small ones that share it, or (0) the packed one whose first record it is.
        """
        waiting = self._small if count else self._packed
        if len(waiting) < max(count, 1):
            raise FormatError(f"manifest: record {record} belongs to no item")
        return tuple(waiting.popleft() for _ in range(max(count, 1)))

    def _share(self, record: StoredRecord) -> None:
        sizes = [self._of[i].sizes[0] for i in record.items]
        if sum(sizes) > MAX_SHARED or len(sizes) > MAX_SHARED:
            raise FormatError(f"manifest: items share a record of {sum(sizes):,} bytes; at most {MAX_SHARED:,}")
        for i, share in zip(record.items, shares(record.nbytes, sizes), strict=True):
            self._shared[i] = record, share

    def packed(self, item: int) -> tuple[int, tuple[StoredChunk, ...]]:
        """A packed item's first byte in its entry, and its chunks."""
        first, chunks = self._first[item], self._of[item].chunks
        return self._starts[first], tuple(
            StoredChunk(c.start, c.stop, c.shape, self._sizes[r], (self._checksums[r],))
            for r, c in enumerate(chunks, first)
        )

    def shared(self, item: int) -> tuple[StoredRecord, tuple[StoredChunk, ...]]:
        """The record of a small item, and its chunk."""
        record, share = self._shared[item]
        (chunk,) = self._of[item].chunks
        return record, (StoredChunk(chunk.start, chunk.stop, chunk.shape, share, ()),)
