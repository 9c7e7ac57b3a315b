"""The items of a manifest of format 1.x: one JSON object an item. Only read; files are written with columns."""

from __future__ import annotations

from typing import Any

from statecodec.errors import FormatError
from statecodec.format.items import PACKED, PLAIN, DeclaredTensor, StoredChunk, StoredItem, read_companions
from statecodec.limits import Limits
from statecodec.strict import Fields, hexadecimal


def read_items(values: list[Any], last_shard: int, newer: bool, limits: Limits) -> tuple[StoredItem, ...]:
    """The manifest's `items`, checked. Raises FormatError and its subclasses."""
    limits.check("manifest: items", len(values), limits.max_items)
    items = tuple(_item(value, i, last_shard, newer, limits) for i, value in enumerate(values))
    packed = [(item.shard, item.entry) for item in items if item.storage == PACKED]
    if len(set(packed)) != len(packed):
        raise FormatError("manifest: two packed items have the same entry")
    return items


def _item(value: object, index: int, last_shard: int, newer: bool, limits: Limits) -> StoredItem:
    fields = Fields(value, f"manifest: item {index}")
    name = fields.take("name", str)
    fields.where = f"manifest: item {name[:200]!r}"
    tensor = DeclaredTensor.read(fields, (PLAIN, PACKED), newer, limits)
    rows = [Fields(row, fields.where) for row in fields.take("chunks", list)]
    cut = tensor.cut((row.shape() for row in rows), len(rows), fields.where, limits)
    chunks = []
    for chunk, row in zip(cut, rows, strict=True):
        sizes = tensor.encoding.parts(chunk.shape, tensor.dtype)
        if tensor.storage == PACKED:
            nbytes = row.integer("nbytes", 1 << 40)
            checksums: tuple[str, ...] = (row.hexadecimal("checksum", 16),)
        else:
            nbytes = sum(spec.nbytes for spec in sizes.values())
            checksums = tuple(hexadecimal(v, 16, row.where) for v in row.take("checksums", list))
            if len(checksums) != len(tensor.parts):
                raise FormatError(f"{row.where}: {len(checksums)} checksums for {len(tensor.parts)} parts")
        row.done(newer)
        chunks.append(StoredChunk(chunk.start, chunk.stop, chunk.shape, nbytes, checksums))
    attributes = fields.take("attributes", dict)
    shard, entry = fields.integer("shard", last_shard), fields.take("entry", str, name)
    companions = fields.take("companions", dict) if tensor.encoding.codec.needs else {}
    fields.done(newer)
    return StoredItem(
        name,
        tensor.encoding,
        tensor.shape,
        tensor.dtype,
        tensor.storage,
        tensor.parts,
        tuple(chunks),
        attributes,
        shard,
        entry,
        companions=read_companions(companions, tensor.encoding.codec, fields.where),
    )
