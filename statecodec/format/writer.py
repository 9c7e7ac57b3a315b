"""Writing a file: any number of threads pack chunks, one appends them in order, and `close` makes them visible."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from statecodec._version import __version__
from statecodec.atomic import File
from statecodec.buffers import Bytes, Pool
from statecodec.codecs import Codec, PartSpec
from statecodec.codecs.chunking import Chunk
from statecodec.errors import UsageError
from statecodec.format import placement
from statecodec.format.container import MANIFEST_ENTRY, VERSION, Entry, build_header
from statecodec.format.index import index_json
from statecodec.format.manifest import PACKED, Manifest, OtherShard, StoredChunk, StoredItem
from statecodec.format.output import Destination
from statecodec.format.packing import Packing, encode_record
from statecodec.format.placement import Item, PlannedItem, plan
from statecodec.limits import Limits
from statecodec.strict import dump_json


@dataclass(frozen=True)
class PackedChunk:
    """One chunk ready to be appended; owns its bytes."""

    item: int
    index: int
    buffer: Bytes
    lengths: tuple[int, ...]  # of the record, or of each plain part
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """An output. `path` is what a Reader opens: the file, or the index of a sharded output. `notes`: what the file
    system could not do for durability or permissions, in words.
    """

    path: Path
    files: tuple[Path, ...]
    nbytes: int
    items: tuple[StoredItem, ...]
    version: tuple[int, int] = VERSION
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """An output that is whole and on the disk, but has not its name yet: a Reader opens `path`, and checks it there.

    `path` and `files` lie in the writer's temporary folder, which leaving the writer removes.
    """

    path: Path
    files: tuple[Path, ...]
    nbytes: int
    items: tuple[StoredItem, ...]
    _destination: Destination

    def publish(self) -> Written:
        """Make it visible under its name, all files or none. Raises OutputExists, OutputFailed."""
        place = self._destination
        place.publish()
        return Written(place.opened, tuple(place.files), self.nbytes, self.items, notes=place.staging.notes)


class Writer:
    """Writes items whose names, codecs, shapes and dtypes are known beforehand; memory does not grow with their size.

        with Writer(path, items) as writer:
            ...                                     # append(pack(...)) every chunk of every item
            finished = writer.finish(document)      # whole and on the disk, under a temporary name
            ...                                     # read finished.path
            written = finished.publish()            # `writer.close(document)` does both

    Leaving the block without publishing, by an exception or not, removes everything it wrote. Raises OutputExists,
    OutputFailed (disk full, I/O errors) and UsageError (wrong order or parts, not JSON).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        items: Sequence[Item],
        *,
        packing: Packing | str = "zstd",
        max_shard_size: int | None = None,
        force: bool = False,
    ) -> None:
        self.packing = Packing.parse(packing) if isinstance(packing, str) else packing
        self._plan = plan(items, self.packing, max_shard_size, _metadata(99_999, 99_999, "0" * 32))
        self.items = tuple(p.item for p in self._plan.items)
        self._attributes = [dict(item.attributes) for item in self.items]
        self._stored: list[list[StoredChunk]] = [[] for _ in self.items]
        self._starts: list[list[int] | None] = [None] * len(self.items)
        self._part_done: dict[str, int] = {}
        self._ends = [shard.packed_start for shard in self._plan.shards]
        self._packed: list[list[Entry]] = [[] for _ in self._plan.shards]
        self._next = (0, 0)
        self._pool = Pool()
        self._files: list[File] = []
        self._destination = Destination(path, len(self._plan.shards), force)
        try:
            for file in self._destination.files:
                self._files.append(self._destination.create(file))
        except BaseException:
            self.abort()
            raise

    def chunks(self, item: int) -> Sequence[Chunk]:
        """The chunks of an item, in the order in which they must be appended."""
        return self._plan.items[item].chunks

    def pack(self, item: int, chunk: Chunk, parts: Mapping[str, Tensor]) -> PackedChunk:
        """Pack one chunk: copies what it needs of `parts` (CPU tensors), which may be reused at once. Thread-safe."""
        planned = self._plan.items[item]
        specs = planned.item.codec.parts(chunk.shape, planned.item.dtype)
        tensors = _checked(parts, specs, planned.item.name)
        index = self._index(item, chunk)
        if planned.storage == PACKED:
            buffer, size = encode_record(tensors, self.packing, self._pool)
            return PackedChunk(item, index, buffer, (size,), (xxhash.xxh3_64_hexdigest(buffer[:size].data),))
        lengths = tuple(t.nbytes for t in tensors)
        buffer = self._pool.take(sum(lengths))
        checksums, position = [], 0
        for tensor, length in zip(tensors, lengths, strict=True):
            target = buffer[position : position + length]
            target[:] = tensor.view(-1).view(torch.uint8).numpy()
            checksums.append(xxhash.xxh3_64_hexdigest(target.data))
            position += length
        return PackedChunk(item, index, buffer, lengths, tuple(checksums))

    def _index(self, item: int, chunk: Chunk) -> int:
        pieces = self._plan.items[item].chunks
        starts = self._starts[item]
        if starts is None:
            starts = self._starts[item] = [c.start for c in pieces]
        index = bisect_left(starts, chunk.start)
        if index == len(pieces) or pieces[index] != chunk:
            raise UsageError(f"item {self.items[item].name!r} has no chunk {chunk}")
        return index

    def append(self, packed: PackedChunk) -> None:
        """Write a packed chunk; they come strictly in the order of items and their chunks. One thread at a time."""
        if not self._files:
            raise UsageError("this writer is closed")
        if (packed.item, packed.index) != self._next:
            raise UsageError(f"chunk {(packed.item, packed.index)} out of order; expected {self._next}")
        planned = self._plan.items[packed.item]
        file, base = self._files[planned.shard], self._plan.shards[planned.shard].header_size
        if planned.storage == PACKED:
            file.write_at(packed.buffer[: packed.lengths[0]].data, base + self._ends[planned.shard])
            self._append_packed(planned, packed)
        else:
            self._append_plain(planned, packed, file, base)
        self._pool.give(packed.buffer)
        chunk = planned.chunks[packed.index]
        stored = StoredChunk(chunk.start, chunk.stop, tuple(chunk.shape), sum(packed.lengths), packed.checksums)
        self._stored[packed.item].append(stored)
        last = packed.index + 1 == len(planned.chunks)
        self._next = (packed.item + 1, 0) if last else (packed.item, packed.index + 1)

    def _append_packed(self, planned: PlannedItem, packed: PackedChunk) -> None:
        start = self._ends[planned.shard]
        stop = self._ends[planned.shard] = start + packed.lengths[0]
        entries = self._packed[planned.shard]
        if packed.index == 0:
            entries.append(Entry(planned.entry, "U8", (stop - start,), start, stop))
        else:
            first = entries[-1].start
            entries[-1] = replace(entries[-1], shape=(stop - first,), stop=stop)

    def _append_plain(self, planned: PlannedItem, packed: PackedChunk, file: File, base: int) -> None:
        if packed.index == 0:
            self._part_done = dict.fromkeys(planned.parts, 0)
        position = 0
        for part, length in zip(planned.parts, packed.lengths, strict=True):
            data = packed.buffer[position : position + length]
            file.write_at(data.data, base + planned.offsets[part] + self._part_done[part])
            self._part_done[part] += length
            position += length

    def restart(self, item: int, codec: Codec) -> None:
        """Store the item that is being appended by another codec: what was appended of it is taken back.

        Raises UsageError for an item with plain parts, whose place was fixed beforehand.
        """
        planned = self._plan.items[item]
        if item != self._next[0] or planned.storage != PACKED:
            raise UsageError(f"item {planned.item.name!r} cannot be stored by another codec any more")
        if self._next[1]:
            self._ends[planned.shard] = self._packed[planned.shard].pop().start
        self._plan.items[item] = placement.recoded(planned, codec)
        self.items = tuple(p.item for p in self._plan.items)
        self._stored[item], self._starts[item], self._next = [], None, (item, 0)

    def set_attributes(self, item: int, attributes: Mapping[str, Any]) -> None:
        """Replace an item's attributes, any time before `close`."""
        self._attributes[item] = dict(attributes)

    def finish(self, document: Mapping[str, Any] | None = None) -> Finished:
        """Write manifest and headers and wait for the disk; nothing is visible yet."""
        if not self._files:
            raise UsageError("this writer is closed")
        if self._next != (len(self.items), 0):
            raise UsageError(f"{len(self.items)} items were announced; chunk {self._next} has not been appended")
        try:
            return self._finish_all(document or {})
        except BaseException:
            self.abort()
            raise

    def close(self, document: Mapping[str, Any] | None = None) -> Written:
        """Finish and publish at once."""
        try:
            return self.finish(document).publish()
        finally:
            self.abort()

    def _finish_all(self, document: Mapping[str, Any]) -> Finished:
        place = self._destination
        others = tuple(OtherShard(place.files[i].name, self._finish(i, None)) for i in range(len(self._files) - 1))
        items = tuple(self._stored_item(i) for i in range(len(self.items)))
        manifest = Manifest(VERSION, f"statecodec {__version__}", others, items, document)
        data = _json(manifest.to_json(), "attributes or document")
        if len(data) > Limits().max_manifest_bytes:
            raise UsageError(f"the manifest would take {len(data):,} bytes, above what readers accept")
        self._finish(len(self._files) - 1, data)
        if place.sharded:
            self._write_index(items, xxhash.xxh3_128_hexdigest(data))
        self._files.clear()
        nbytes = sum(s.header_size + end for s, end in zip(self._plan.shards, self._ends, strict=True))
        made = place.staging.folder
        return Finished(made / place.opened.name, tuple(made / f.name for f in place.files), nbytes, items, place)

    def _stored_item(self, i: int) -> StoredItem:
        p = self._plan.items[i]
        item = p.item
        return StoredItem(
            item.name, item.codec, tuple(item.shape), item.dtype, p.storage, p.parts, tuple(self._stored[i]),
            self._attributes[i], p.shard, p.entry,
            {role: item.companions[role] for role in item.codec.needs},
        )  # fmt: skip

    def _finish(self, i: int, manifest: bytes | None) -> str:
        """Complete one shard on disk; returns its header's digest."""
        shard, file, end = self._plan.shards[i], self._files[i], self._ends[i]
        entries = [*shard.plain, *self._packed[i]]
        digest = None
        if manifest is not None:
            digest = xxhash.xxh3_128_hexdigest(manifest)
            file.write_at(manifest, shard.header_size + end)
            stop = self._ends[i] = end + len(manifest)
            entries.append(Entry(MANIFEST_ENTRY, "U8", (len(manifest),), end, stop))
        metadata = _metadata(i + 1, len(self._files), digest)
        header, header_digest = build_header(entries, metadata, shard.header_size)
        file.write_at(header, 0)
        file.finish(shard.header_size + self._ends[i], self._destination.mode())
        return header_digest

    def _write_index(self, items: Sequence[StoredItem], digest: str) -> None:
        names = [file.name for file in self._destination.files]
        data = _json(index_json(items, names, sum(self._ends), digest), "item names")
        file = self._destination.create(self._destination.index)
        try:
            file.write_at(data, 0)
            file.finish(len(data), self._destination.mode())
        finally:
            file.close()

    def abort(self) -> None:
        """Remove everything that is not published. May be called at any time, more than once."""
        while self._files:
            self._files.pop().close()
        self._destination.staging.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _metadata(shard: int, shards: int, manifest: str | None) -> dict[str, str]:
    metadata = {"format": "statecodec", "statecodec.version": f"{VERSION[0]}.{VERSION[1]}"}
    if shards > 1:
        metadata["statecodec.shard"] = f"{shard}/{shards}"
    return metadata if manifest is None else {**metadata, "statecodec.manifest": manifest}


def _checked(parts: Mapping[str, Tensor], specs: Mapping[str, PartSpec], name: str) -> list[Tensor]:
    found = {k: PartSpec(t.dtype, tuple(t.shape)) for k, t in parts.items()}
    if found != dict(specs):
        raise UsageError(f"item {name!r}: its chunk should have parts {dict(specs)}, found {found}")
    if any(t.device.type != "cpu" for t in parts.values()):
        raise UsageError(f"item {name!r}: move its parts to the CPU before packing them")
    return [parts[k].detach().contiguous() for k in specs]


def _json(value: Any, what: str) -> bytes:
    try:
        return dump_json(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{what} cannot be written as JSON: {error}") from error
