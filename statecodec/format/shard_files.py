"""The files of an output while they are written: plain parts in their places, records one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from statecodec.buffers import Bytes
from statecodec.errors import UsageError
from statecodec.format.container import MANIFEST_ENTRY, VERSION, TensorEntry, build_header
from statecodec.format.index import index_json
from statecodec.format.items import StoredItem, packed_entry
from statecodec.format.output import Destination
from statecodec.format.placement import PlannedItem, ShardPlan
from statecodec.staging import StagedFile
from statecodec.strict import dump_json


class ShardFiles:
    """One file for each shard, under temporary names. Offsets of records count from the start of their shard's entry.

    Args:
        destination: Where the output goes.
        shards: The files as they were planned.

    Raises:
        OutputFailed: If a file cannot be made.
    """

    def __init__(self, destination: Destination, shards: Sequence[ShardPlan]) -> None:
        self._destination, self._shards = destination, shards
        self._ends = [shard.packed_start for shard in shards]  # of the data section as far as it is written
        self._parts_done: dict[str, int] = {}
        self._files: list[StagedFile] = []
        try:
            for file in destination.files:
                self._files.append(destination.create(file))
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether anything can still be written."""
        return bool(self._files)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(shard.header_size + end for shard, end in zip(self._shards, self._ends, strict=True))

    def append_record(self, shard: int, record: Bytes) -> int:
        """Write a record behind the others of its shard; returns its offset."""
        self._files[shard].write_at(record.data, self._shards[shard].header_size + self._ends[shard])
        start = self._ends[shard] - self._shards[shard].packed_start
        self._ends[shard] += record.size
        return start

    def take_back(self, shard: int, offset: int) -> None:
        """Let the next record of a shard begin at this offset again."""
        self._ends[shard] = offset + self._shards[shard].packed_start

    def write_plain(self, planned: PlannedItem, chunk: int, buffer: Bytes, lengths: Sequence[int]) -> None:
        """Write the parts of the next chunk of an item, each behind what is there of it."""
        file, base = self._files[planned.shard], self._shards[planned.shard].header_size
        if chunk == 0:
            self._parts_done = dict.fromkeys(planned.parts, 0)
        position = 0
        for part, length in zip(planned.parts, lengths, strict=True):
            data = buffer[position : position + length]
            file.write_at(data.data, base + planned.offsets[part] + self._parts_done[part])
            self._parts_done[part] += length
            position += length

    def finish(self, i: int, manifest: bytes | None = None) -> str:
        """Complete one file on disk, with the manifest in it if it is the last; returns its header's digest."""
        shard, file, end = self._shards[i], self._files[i], self._ends[i]
        entries, packed = list(shard.plain), end - shard.packed_start
        if packed:
            entries.append(TensorEntry(packed_entry(i), "U8", (packed,), shard.packed_start, end))
        digest = None
        if manifest is not None:
            digest = xxhash.xxh3_128_hexdigest(manifest)
            file.write_at(manifest, shard.header_size + end)
            stop = self._ends[i] = end + len(manifest)
            entries.append(TensorEntry(MANIFEST_ENTRY, "U8", (len(manifest),), end, stop))
        header, header_digest = build_header(entries, metadata(i + 1, len(self._files), digest), shard.header_size)
        file.write_at(header, 0)
        file.finish(shard.header_size + self._ends[i], self._destination.mode())
        return header_digest

    def write_index(self, items: Sequence[StoredItem], digest: str) -> None:
        """Write the index of several files. Raises UsageError for names of items that are no text."""
        names = [file.name for file in self._destination.files]
        try:
            data = dump_json(index_json(items, names, sum(self._ends), digest))
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"item names cannot be written as JSON: {error}") from error
        file = self._destination.create(self._destination.index)
        try:
            file.write_at(data, 0)
            file.finish(len(data), self._destination.mode())
        finally:
            file.close()

    def close(self) -> None:
        """Close the files. May be called more than once."""
        while self._files:
            self._files.pop().close()


def metadata(shard: int, shards: int, manifest: str | None) -> dict[str, str]:
    """What the header of a file holds; `manifest` is the digest of the manifest, in the file that has it."""
    fields = {"format": "statecodec", "statecodec.version": f"{VERSION[0]}.{VERSION[1]}"}
    if shards > 1:
        fields["statecodec.shard"] = f"{shard}/{shards}"
    return fields if manifest is None else {**fields, "statecodec.manifest": manifest}
