"""The CRC-32s of a source's zip records, which torch.load never checks, against what is read of it for encoding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator
from functools import partial

from zlib_ng import zlib_ng

from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_files import check_crc
from statecodec.checkpoint.source_items import SourceItem
from statecodec.checkpoint.span_crcs import SpanCrcs
from statecodec.codecs.chunking import Chunk
from statecodec.files import read_exactly
from statecodec.layouts import Crc32


class SourceCrcs:
    """Checks the records that these items begin in; with the first item of a file, those too that no tensor begins in.

    Thread-safe. Raises MalformedCheckpoint for a record whose CRC-32 is another one.
    """

    def __init__(self, source: SourceCheckpoint, items: Collection[int]) -> None:
        self._source = source
        self._files = {
            number: SpanCrcs(spans, partial(self._read, number), partial(self._compare, number))
            for number, spans in _records(source, items)
        }

    def add(self, item: SourceItem, chunk: Chunk, data: memoryview) -> None:
        """These elements of an item have been read."""
        crcs = self._files.get(item.file)
        if crcs is not None and item.region is not None:
            crcs.add(item.region.offset + chunk.start * item.dtype.itemsize, len(data), zlib_ng.crc32(data))

    def finish(self) -> None:
        """Check what has not been read as a whole."""
        for crcs in self._files.values():
            crcs.finish()

    def _read(self, file: int, offset: int, target: memoryview) -> None:
        with self._source.files.open(file) as fd:
            read_exactly(fd, offset, target, str(self._source.files.path(file)))

    def _compare(self, file: int, record: Crc32, crc: int) -> None:
        with self._source.files.open(file) as fd:
            check_crc(fd, record, crc, str(self._source.files.path(file)))


def _records(source: SourceCheckpoint, items: Collection[int]) -> Iterator[tuple[int, list[Crc32]]]:
    """The records to check, by file."""
    first: dict[int, int] = {}
    begins: dict[int, list[tuple[int, int]]] = {}
    for item in source.items:
        first.setdefault(item.file, item.index)
        if item.region is not None:
            begins.setdefault(item.file, []).append((item.region.offset, item.index))

    def owner(file: int, record: Crc32) -> int:
        regions = begins.get(file, [])
        at = bisect_left(regions, (record.offset,))
        within = at < len(regions) and regions[at][0] < record.offset + record.nbytes
        return regions[at][1] if within else first[file]

    for file in first:
        records = [record for record in source.located.files[file].crcs if owner(file, record) in items]
        if records:
            yield file, records
