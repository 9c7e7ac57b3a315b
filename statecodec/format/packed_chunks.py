"""One chunk of an item, packed: what any number of threads make and one appends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from statecodec.buffers import Bytes, Pool
from statecodec.format import part_tensors
from statecodec.format.items import PACKED, PLAIN
from statecodec.format.packing import Packing, encode_record
from statecodec.format.placement import PlannedItem
from statecodec.format.words import words_of

if TYPE_CHECKING:
    from torch import Tensor

TEXT_PACKING = Packing("zstd", 3)
"""With a match finder, for text and small tensors, which repeat each other."""


@dataclass(frozen=True)
class PackedChunk:
    """One chunk ready to be appended; owns its bytes.

    Args:
        item: The item's position.
        index: The chunk's position in the item.
        buffer: The bytes.
        lengths: Of the record, or of each plain part, in bytes.
        checksums: XXH3-64 of each of them, in hexadecimal.
    """

    item: int
    index: int
    buffer: Bytes
    lengths: tuple[int, ...]  # of the record, or of each plain part
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class VerifiedRecord:
    """A packed chunk as it lies in the file, verified.

    Args:
        data: Its bytes.
        checksum: Their XXH3-64, in hexadecimal.
    """

    data: Bytes
    checksum: str


def pack_chunk(
    planned: PlannedItem, number: tuple[int, int], parts: Mapping[str, Tensor], packing: Packing, pool: Pool
) -> PackedChunk:
    """Pack a chunk. Thread-safe.

    Args:
        planned: The item.
        number: The position of the item, and that of the chunk in it.
        parts: The chunk's parts by name, on the CPU. They are copied.
        packing: How, if it is packed.
        pool: Where the memory comes from; whoever appends the chunk gives it back.

    Raises:
        UsageError: If the parts are not those of the chunk.
    """
    specs = planned.item.encoding.parts(planned.chunks[number[1]].shape, planned.item.dtype)
    named = part_tensors.matching(parts, specs, f"item {planned.item.name!r}: its chunk")
    tensors = [part if part.is_contiguous() else part.contiguous() for part in named.values()]
    if planned.storage == PACKED:
        buffer, size = encode_record(tensors, packing, pool)
        return PackedChunk(*number, buffer, (size,), (xxhash.xxh3_64_hexdigest(buffer[:size].data),))
    lengths = tuple(t.nbytes for t in tensors)
    buffer = pool.take(sum(lengths))
    checksums, position = [], 0
    for tensor, length in zip(tensors, lengths, strict=True):
        target = buffer[position : position + length]
        target[:] = words_of(tensor).array.view(np.uint8)
        if planned.storage == PLAIN:
            checksums.append(xxhash.xxh3_64_hexdigest(target.data))
        position += length
    return PackedChunk(*number, buffer, lengths, tuple(checksums))
