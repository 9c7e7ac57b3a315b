"""Writing a file: any number of threads pack chunks, one appends them in order, and `close` makes them visible."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import xxhash

from statecodec._version import __version__
from statecodec.buffers import Pool
from statecodec.codecs import Encoding
from statecodec.codecs.chunking import Chunk
from statecodec.errors import UsageError
from statecodec.format import placement, sharing
from statecodec.format.container import VERSION
from statecodec.format.finished import Finished, Written, opened
from statecodec.format.items import PACKED, PLAIN, SHARED, StoredChunk, StoredItem, StoredRecord, packed_entry, shares
from statecodec.format.manifest import Manifest, OtherShard
from statecodec.format.output import Destination
from statecodec.format.packed_chunks import TEXT_PACKING, PackedChunk, VerifiedRecord, pack_chunk
from statecodec.format.packing import Packing, encode_record
from statecodec.format.placement import ItemSpec, PlannedItem, plan
from statecodec.format.reader import Reader
from statecodec.format.shard_files import ShardFiles, metadata

if TYPE_CHECKING:
    from torch import Tensor

_SHARING_ITEMS = 1024  # most small items in one record: reading one unpacks all
_SHARING_BYTES = 256 << 10  # of their parts, about


class Writer:
    """Writes items whose names, codecs, shapes and dtypes are known beforehand; memory does not grow with their size.

        with Writer(path, items) as writer:
            ...                                     # append(pack(...)) every chunk of every item
            finished = writer.finish(document)      # whole and on the disk, under a temporary name
            ...                                     # look at it through finished.reader
            written = finished.publish()            # `writer.close(document)` does both

    Leaving the block without publishing, by an exception or not, removes everything it wrote.

    Args:
        path: The file to write.
        items: What to write, in order.
        packing: How to pack: a Packing or its text.
        max_shard_size: Largest size of one file, in bytes; None for a single file.
        force: Replace a file that is there.

    Raises:
        UsageError: For items that contradict each other, or that no reader would accept.
        OutputExists: If `path` is there, without `force`.
        OutputFailed: If it cannot be written: disk full, I/O errors.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        items: Sequence[ItemSpec],
        *,
        packing: Packing | str = "zstd",
        max_shard_size: int | None = None,
        force: bool = False,
    ) -> None:
        self.packing = Packing.parse(packing) if isinstance(packing, str) else packing
        self._plan = plan(items, self.packing, max_shard_size, metadata(99_999, 99_999, "0" * 32))
        self._attributes = [dict(item.attributes) for item in items]
        self._chunks: list[list[StoredChunk]] = [[] for _ in items]
        self._first: list[int] = [0] * len(items)  # byte of each packed item's first record in its shard's entry
        self._records: dict[int, StoredRecord] = {}  # of small items
        self._small: list[PackedChunk] = []  # that wait for a record to share
        self._small_nbytes = 0
        self._next = (0, 0)
        self._pool = Pool()
        self._reader: Reader | None = None
        self._destination = Destination(path, len(self._plan.shards), force)
        try:
            self._files = ShardFiles(self._destination, self._plan.shards)
        except BaseException:
            self._destination.staging.close()
            raise

    @property
    def items(self) -> tuple[ItemSpec, ...]:
        """What is written, in order."""
        return tuple(planned.item for planned in self._plan.items)

    def chunks(self, item: int) -> Sequence[Chunk]:
        """The chunks of an item.

        Args:
            item: The item's position.

        Returns:
            The chunks, in the order in which they must be appended.
        """
        return self._plan.items[item].chunks

    def pack(self, item: int, chunk: Chunk, parts: Mapping[str, Tensor]) -> PackedChunk:
        """Pack one chunk. Thread-safe.

        Args:
            item: The item's position.
            chunk: One of its chunks.
            parts: Its parts by name, on the CPU. What is needed of them is copied, so they may be used again at once.

        Returns:
            The packed chunk.

        Raises:
            UsageError: If the chunk or the parts are not those of the item.
        """
        planned = self._plan.items[item]
        of_text = planned.item.text and self.packing.level is None
        packing = TEXT_PACKING if of_text else self.packing.settled(planned.item.low_rank)
        return pack_chunk(planned, (item, self._index(item, chunk)), parts, packing, self._pool)

    def repacked(self, item: int, chunk: Chunk, record: VerifiedRecord) -> PackedChunk:
        """Make a packed chunk of a record from another file. Thread-safe.

        Args:
            item: The item's position.
            chunk: One of its chunks.
            record: What `Reader.record` gave.

        Returns:
            The packed chunk.

        Raises:
            UsageError: If the item is not packed.
        """
        planned = self._plan.items[item]
        if planned.storage != PACKED:
            raise UsageError(f"item {planned.item.name!r} is {planned.storage} here: pack its parts")
        buffer = self._pool.take(record.data.size)
        buffer[: record.data.size] = record.data
        return PackedChunk(item, self._index(item, chunk), buffer, (record.data.size,), (record.checksum,))

    def _index(self, item: int, chunk: Chunk) -> int:
        pieces = self._plan.items[item].chunks
        index = bisect_left(pieces, chunk.start, key=lambda piece: piece.start)
        if index == len(pieces) or pieces[index] != chunk:
            raise UsageError(f"item {self._plan.items[item].item.name!r} has no chunk {chunk}")
        return index

    def append(self, packed: PackedChunk) -> None:
        """Write a packed chunk. One thread at a time.

        Args:
            packed: The next chunk; chunks come strictly in the order of items and their chunks.

        Raises:
            UsageError: If it is another chunk.
            OutputFailed: If it cannot be written.
        """
        if not self._files.is_open:
            raise UsageError("this writer is closed")
        if (packed.item, packed.index) != self._next:
            raise UsageError(f"chunk {(packed.item, packed.index)} out of order; expected {self._next}")
        planned = self._plan.items[packed.item]
        if self._small and (planned.shard != self._plan.items[self._small[0].item].shard or self._is_full(planned)):
            self._share_record()
        if planned.storage == SHARED:
            self._small.append(packed)
            self._small_nbytes += sum(packed.lengths)
        else:
            self._append_large(planned, packed)
        last = packed.index + 1 == len(planned.chunks)
        self._next = (packed.item + 1, 0) if last else (packed.item, packed.index + 1)

    def _append_large(self, planned: PlannedItem, packed: PackedChunk) -> None:
        if planned.storage == PACKED:
            start = self._files.append_record(planned.shard, packed.buffer[: packed.lengths[0]])
            if packed.index == 0:
                self._first[packed.item] = start
        else:
            self._files.write_plain(planned, packed.index, packed.buffer, packed.lengths)
        self._pool.give(packed.buffer)
        c = planned.chunks[packed.index]
        self._chunks[packed.item].append(
            StoredChunk(c.start, c.stop, tuple(c.shape), sum(packed.lengths), packed.checksums)
        )

    def _is_full(self, planned: PlannedItem) -> bool:
        if planned.storage != SHARED:
            return False
        return len(self._small) >= _SHARING_ITEMS or self._small_nbytes >= _SHARING_BYTES

    def _share_record(self) -> None:
        """Write one record of the small items that wait for it."""
        small, self._small, self._small_nbytes = self._small, [], 0
        planned = [self._plan.items[p.item] for p in small]
        shard, owners = planned[0].shard, tuple(p.item for p in small)
        content = sharing.join([(p.parts, packed.buffer) for p, packed in zip(planned, small, strict=True)])
        buffer, size = encode_record(content, TEXT_PACKING, self._pool)
        start = self._files.append_record(shard, buffer[:size])
        record = StoredRecord(shard, start, size, xxhash.xxh3_64_hexdigest(buffer[:size].data), owners)
        self._pool.give(buffer)
        for packed, p, share in zip(small, planned, shares(size, [sum(p.lengths) for p in small]), strict=True):
            (c,) = p.chunks
            self._records[packed.item] = record
            self._chunks[packed.item].append(StoredChunk(c.start, c.stop, tuple(c.shape), share, ()))
            self._pool.give(packed.buffer)

    def restart(self, item: int, encoding: Encoding) -> None:
        """Store the item that is being appended in another way; what was appended of it is taken back.

        Args:
            item: The item's position.
            encoding: How it is stored now.

        Raises:
            UsageError: For an item with plain parts, whose place was fixed beforehand.
        """
        planned = self._plan.items[item]
        if item != self._next[0]:
            raise UsageError(f"item {planned.item.name!r} cannot be stored in another way any more")
        self._plan.items[item] = placement.recoded(planned, encoding, self.packing, len(self._plan.items))
        if self._chunks[item]:
            self._files.take_back(planned.shard, self._first[item])
        self._chunks[item], self._next = [], (item, 0)

    def set_attributes(self, item: int, attributes: Mapping[str, Any]) -> None:
        """Replace an item's attributes, any time before `close`.

        Args:
            item: The item's position.
            attributes: JSON values.
        """
        self._attributes[item] = dict(attributes)

    def finish(self, document: Mapping[str, Any] | None = None) -> Finished:
        """Write manifest and headers, wait for the disk and open the output. It is not visible yet.

        Args:
            document: JSON values that the file carries.

        Returns:
            The output, under a temporary name.

        Raises:
            UsageError: If chunks are missing, the document is not JSON, or no reader would open the file.
            OutputFailed: If it cannot be written.
        """
        self._check_complete()
        try:
            return self._finish_all(document or {})
        except BaseException:
            self.abort()
            raise

    def close(self, document: Mapping[str, Any] | None = None) -> Written:
        """Finish and publish at once.

        Args:
            document: JSON values that the file carries.

        Returns:
            What is there now.

        Raises:
            UsageError: As for `finish`.
            OutputExists: If the name is taken, without `force`.
            OutputFailed: If it cannot be written.
        """
        self._check_complete()
        try:
            return self.finish(document).publish()
        finally:
            self.abort()

    def _check_complete(self) -> None:
        if not self._files.is_open:
            raise UsageError("this writer is closed")
        if self._next != (len(self._plan.items), 0):
            raise UsageError(f"{len(self._plan.items)} items were announced; chunk {self._next} has not been appended")

    def _finish_all(self, document: Mapping[str, Any]) -> Finished:
        destination = self._destination
        if self._small:
            self._share_record()
        last = len(destination.files) - 1
        others = tuple(OtherShard(destination.files[i].name, self._files.finish(i)) for i in range(last))
        items = tuple(self._stored_item(i) for i in range(len(self._plan.items)))
        try:
            data = Manifest(VERSION, f"statecodec {__version__}", others, items, document).to_bytes()
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"attributes or document cannot be written as JSON: {error}") from error
        self._files.finish(last, data)
        if destination.sharded:
            self._files.write_index(items, xxhash.xxh3_128_hexdigest(data))
        self._files.close()
        folder = destination.staging.folder
        path, files = folder / destination.opened.name, tuple(folder / f.name for f in destination.files)
        self._reader = opened(path)
        return Finished(path, files, self._files.nbytes, items, self._reader, destination)

    def _stored_item(self, i: int) -> StoredItem:
        p = self._plan.items[i]
        item, entry = p.item, p.entry if p.storage == PLAIN else packed_entry(p.shard)
        return StoredItem(
            item.name,
            item.encoding,
            tuple(item.shape),
            item.dtype,
            p.storage,
            p.parts,
            tuple(self._chunks[i]),
            self._attributes[i],
            p.shard,
            entry,
            self._first[i],
            self._records.get(i),
            {role: item.companions[role] for role in item.encoding.codec.needs},
        )

    def abort(self) -> None:
        """Remove everything that is not published. May be called at any time, more than once."""
        self._files.close()
        if self._reader is not None:
            self._reader.close()
        self._destination.staging.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
