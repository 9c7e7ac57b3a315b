"""Reading a file: its structure is checked when it is opened, every chunk when it is read; no byte is trusted."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from statecodec import dtypes
from statecodec.buffers import Bytes, Pool
from statecodec.codecs import EncodedTensor, PartSpec
from statecodec.dtypes import UINT8
from statecodec.errors import CorruptFile, FormatError, UsageError
from statecodec.files import LocalFile
from statecodec.format import part_tensors, sharing
from statecodec.format.items import PACKED, ItemCheck, StoredItem, StoredRecord
from statecodec.format.open_files import OpenFile, OpenFiles
from statecodec.format.opening import open_output
from statecodec.format.packed_chunks import VerifiedRecord
from statecodec.format.packing import decode_bytes, decode_record
from statecodec.lazy import torch
from statecodec.limits import Limits

if TYPE_CHECKING:
    from torch import Tensor

_UNPACKED = 8  # shared records that are kept: neighbours are read together


class Reader:
    """An open file of this format. Close it, or use it as a context manager.

    `read_chunk` and `read` are thread-safe and touch only the item's bytes.

    Args:
        path: A file, or the index of a sharded output, or the name that the output was written under.
        limits: What is accepted before anything is allocated.
        open_file: Opens a file by its path, where it is not on this machine.

    Raises:
        FormatError: If it is no such file, or damaged, or beyond the limits (its subclasses say which).

    Example:
        >>> import tempfile, torch, statecodec
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = statecodec.save({"w": torch.arange(3)}, f"{folder}/state.safetensors")
        ...     with Reader(f"{folder}/state.safetensors") as reader:
        ...         reader.read("w").decode(), all(item.error is None for item in reader.verify())
        (tensor([0, 1, 2]), True)
    """

    def __init__(
        self, path: str | os.PathLike[str], limits: Limits | None = None, open_file: OpenFile = LocalFile
    ) -> None:
        self.path = Path(path)
        self.limits = limits or Limits()
        self._pool = Pool(32 << 20)
        self._files = OpenFiles(open_file)
        self._known_offsets: dict[int, _Offsets] = {}
        self._unpacked: dict[StoredRecord, dict[int, dict[str, Tensor]]] = {}  # shared records, the last used last
        self._lock = threading.Lock()
        try:
            opened = open_output(self.path, self._files, self.limits)
        except BaseException:
            self.close()
            raise
        self._headers, self.files, self.nbytes = opened.headers, opened.files, opened.nbytes
        self.items: tuple[StoredItem, ...] = opened.manifest.items
        self.document: Mapping[str, Any] = opened.manifest.document
        self.format_version, self.writer = opened.manifest.version, opened.manifest.writer
        self._by_name = {item.name: i for i, item in enumerate(self.items)}

    @property
    def digest(self) -> str:
        """XXH3-128 of the manifest, which holds every checksum: it identifies the file for whoever refers to it."""
        return self._headers[-1].metadata["statecodec.manifest"]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def index(self, name: str) -> int:
        """Look up an item.

        Args:
            name: Its name.

        Returns:
            Its position in `items`.

        Raises:
            UsageError: If there is none of that name.
        """
        if name not in self._by_name:
            raise UsageError(f"{self.path} has no item {name!r}")
        return self._by_name[name]

    def read(self, name: str) -> EncodedTensor:
        """Read one whole item, verified.

        Args:
            name: Its name.

        Returns:
            The encoded tensor, on the CPU.

        Raises:
            UsageError: If there is none of that name.
            FormatError: For damage, and for a change since a base, which alone is no tensor.
        """
        i = self.index(name)
        item = self.items[i]
        if item.encoding.change is not None:
            raise FormatError(
                f"{self.path}: {name} is stored as what changed since a base checkpoint ({item.encoding}); this file "
                "alone does not hold it"
            )
        parts = part_tensors.empty(item.parts)
        offsets = self._offsets(i)
        flat = {k: part.view(-1).view(torch.uint8) for k, part in parts.items()}
        for k, chunk in enumerate(item.chunks):
            specs = item.encoding.parts(chunk.shape, item.dtype)
            out = {
                n: flat[n][offsets.parts[n][k] :][: s.nbytes].view(s.dtype.torch).view(s.shape)
                for n, s in specs.items()
            }
            self.read_chunk(i, k, out)
        return EncodedTensor(item.encoding.codec, item.shape, item.dtype.torch, parts)

    def stored_nbytes(self, item: int) -> int:
        """Bytes of an item in the file.

        Args:
            item: Its position in `items`.

        Returns:
            The number of bytes.
        """
        return self.items[item].stored_nbytes

    def verify(self) -> Iterator[ItemCheck]:
        """Read every chunk of every item, one item at a time; damage is reported, not raised."""
        out: dict[str, Tensor] = {}
        for i, item in enumerate(self.items):
            error = None
            try:
                for k, chunk in enumerate(item.chunks):
                    specs = item.encoding.parts(chunk.shape, item.dtype)
                    fits = {n: PartSpec(dtypes.of(t.dtype), tuple(t.shape)) for n, t in out.items()} == specs
                    out = self.read_chunk(i, k, out if fits else None)
            except FormatError as caught:
                error = caught
            yield ItemCheck(item.name, item.stored_nbytes, error)

    def read_chunk(self, item: int, chunk: int, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Read the parts of one chunk, verified.

        Args:
            item: The item's position in `items`.
            chunk: The chunk's position in the item's `chunks`.
            out: Contiguous CPU tensors of the chunk's parts to read into; by default new ones.

        Returns:
            The parts by name.

        Raises:
            CorruptFile: If a checksum does not match.
            FormatError: If a record is not what it must be.
            UsageError: If `out` does not fit.
        """
        stored = self.items[item]
        specs = stored.encoding.parts(stored.chunks[chunk].shape, stored.dtype)
        parts = part_tensors.empty(specs) if out is None else part_tensors.matching(_contiguous(out), specs, "out")
        with self._naming(stored, chunk):
            if stored.storage == PACKED:
                with self._record_of(item, chunk) as record:
                    decode_record(record, list(parts.values()), self._pool)
            elif stored.record is not None:
                self._read_shared(item, stored.record, parts)
            else:
                for name, part in parts.items():
                    self._read_plain(item, chunk, name, part.view(-1).view(torch.uint8).numpy())
        return parts

    def read_bytes(self, item: int, chunk: int) -> Bytes:
        """Read and verify a chunk of raw bytes. torch is not needed for it.

        Args:
            item: The item's position; raw, uint8, of one dimension.
            chunk: The chunk's position in the item.

        Returns:
            Its bytes.

        Raises:
            CorruptFile: If they are not what was written.
        """
        stored = self.items[item]
        ((name, spec),) = stored.encoding.parts(stored.chunks[chunk].shape, stored.dtype).items()
        with self._naming(stored, chunk):
            if stored.storage == PACKED:
                with self._record_of(item, chunk) as record:
                    return decode_bytes(record, [spec], 0, self._pool)
            if stored.record is not None:
                return self._shared_bytes(item, stored.record)
            data = np.empty(spec.nbytes, np.uint8)
            self._read_plain(item, chunk, name, data)
            return data

    @contextmanager
    def _naming(self, stored: StoredItem, chunk: int) -> Iterator[None]:
        """Errors say which item and chunk they are of."""
        try:
            yield
        except FormatError as error:
            where = f"{self.files[stored.shard].name}: item {stored.name[:200]!r}, chunk {chunk}"
            raise type(error)(f"{where}: {error}") from error

    def record(self, item: int, chunk: int) -> VerifiedRecord:
        """Read a chunk of a packed item as it is stored, to be written elsewhere.

        Args:
            item: The item's position in `items`.
            chunk: The chunk's position in the item's `chunks`.

        Returns:
            The record, verified.

        Raises:
            CorruptFile: If its checksum does not match.
            UsageError: If the item is not packed.
        """
        stored = self.items[item]
        if stored.storage != PACKED:
            raise UsageError(f"item {stored.name!r} is {stored.storage}: its chunks have no records of their own")
        header, piece = self._headers[stored.shard], stored.chunks[chunk]
        data = np.empty(piece.nbytes, np.uint8)
        start = header.data + header.entries[stored.entry].start + stored.start + self._offsets(item).records[chunk]
        self._files.read_into(stored.shard, start, data.data)
        _check(data, piece.checksums[0])
        return VerifiedRecord(data, piece.checksums[0])

    def _record_of(self, i: int, chunk: int) -> AbstractContextManager[Bytes]:
        item = self.items[i]
        start, place = item.start + self._offsets(i).records[chunk], item.chunks[chunk]
        return self._checked(item, start, place.nbytes, place.checksums[0])

    @contextmanager
    def _checked(self, item: StoredItem, start: int, size: int, checksum: str) -> Iterator[Bytes]:
        """A record of the entry that an item's records lie in, in pooled memory."""
        header = self._headers[item.shard]
        buffer = self._pool.take(size)
        record = buffer[:size]
        self._files.read_into(item.shard, header.data + header.entries[item.entry].start + start, record.data)
        _check(record, checksum)
        yield record
        self._pool.give(buffer)

    def _read_shared(self, i: int, record: StoredRecord, parts: Mapping[str, Tensor]) -> None:
        with self._lock:
            unpacked = self._unpacked.pop(record, None)
        if unpacked is None:
            specs = [self.items[owner].parts for owner in record.items]
            vectors = sharing.vectors(specs)
            with self._checked(self.items[i], record.start, record.nbytes, record.checksum) as data:
                decode_record(data, vectors, self._pool)
            unpacked = dict(zip(record.items, sharing.split(specs, vectors), strict=True))
        with self._lock:
            self._unpacked[record] = unpacked
            while len(self._unpacked) > _UNPACKED:
                self._unpacked.pop(next(iter(self._unpacked)))
        for name, part in parts.items():
            part.copy_(unpacked[i][name])

    def _shared_bytes(self, i: int, record: StoredRecord) -> Bytes:
        owners = [self.items[owner].parts for owner in record.items]
        specs, before = sharing.specs(owners), sharing.specs(owners[: record.items.index(i)])
        number = next(n for n, spec in enumerate(specs) if spec.dtype is UINT8)
        start = sum(spec.numel for spec in before if spec.dtype is UINT8)
        with self._checked(self.items[i], record.start, record.nbytes, record.checksum) as data:
            return decode_bytes(data, specs, number, self._pool)[start : start + self.items[i].decoded_nbytes]

    def _read_plain(self, i: int, chunk: int, part: str, target: Bytes) -> None:
        item = self.items[i]
        header, number = self._headers[item.shard], list(item.parts).index(part)
        start = header.entries[f"{item.entry}/{part}"].start + self._offsets(i).parts[part][chunk]
        self._files.read_into(item.shard, header.data + start, target.data)
        _check(target, item.chunks[chunk].checksums[number])

    def _offsets(self, i: int) -> _Offsets:
        if i not in self._known_offsets:
            item = self.items[i]
            sizes = [item.encoding.parts(chunk.shape, item.dtype) for chunk in item.chunks]
            parts = {name: _running([specs[name].nbytes for specs in sizes]) for name in item.parts}
            self._known_offsets[i] = _Offsets(_running([chunk.nbytes for chunk in item.chunks]), parts)
        return self._known_offsets[i]

    def close(self) -> None:
        """Close the files. The reader cannot be used after that."""
        self._files.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Offsets:
    """Where each chunk of an item starts: its record in the item's entry, and its share of each part."""

    records: Sequence[int]
    parts: Mapping[str, Sequence[int]]


def _running(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)][:-1]


def _contiguous(out: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not all(part.is_contiguous() for part in out.values()):
        raise UsageError("out should have parts that are contiguous")
    return out


def _check(data: Bytes, checksum: str) -> None:
    if xxhash.xxh3_64_hexdigest(data.data) != checksum:
        raise CorruptFile("the checksum does not match: the file is damaged")
