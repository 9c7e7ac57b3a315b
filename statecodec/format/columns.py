"""The items of a manifest since format 2.0: what many have in common is written once, the rest in columns.

`forms` say what items are like, `items` name them and the form of each, `records` list all packed records in file
order. Where everything lies follows from the order alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from statecodec.errors import FormatError
from statecodec.format.entry_types import dtype_name
from statecodec.format.items import (
    PACKED,
    PLAIN,
    SHARED,
    DeclaredTensor,
    StoredChunk,
    StoredItem,
    packed_entry,
    parts_json,
    read_companions,
)
from statecodec.format.places import ChunkedTensor, RecordTable
from statecodec.limits import MAX_CHUNKS, Limits
from statecodec.strict import Fields, shape

_HEX = re.compile(r"[0-9a-f]*")


def write_items(items: Sequence[StoredItem], shards: int) -> dict[str, Any]:
    """The fields `forms`, `items`, `records` and `plain` of a manifest."""
    numbers: dict[Any, int] = {}
    forms: list[dict[str, Any]] = []
    column: list[int] = []
    plain: list[str] = []
    counts = [0] * shards
    for item in items:
        key = (item.encoding, item.dtype, item.shape, item.storage)
        number = numbers.get(key)
        if number is None:
            number = numbers[key] = len(forms)
            forms.append(_form_json(item))
        column.append(number)
        counts[item.shard] += 1
        if item.storage == PLAIN:
            plain.extend(checksum for chunk in item.chunks for checksum in chunk.checksums)
    renamed = [[i, item.entry] for i, item in enumerate(items) if item.storage == PLAIN and item.entry != item.name]
    return {
        "forms": forms,
        "items": {
            "name": [item.name for item in items], "form": column, "shards": counts, "entry": renamed,
            "companions": [[i, dict(item.companions)] for i, item in enumerate(items) if item.companions],
            "attributes": _attributes_json(items),
        },
        "records": _records_json(items),
        "plain": "".join(plain),
    }  # fmt: skip


def _form_json(item: StoredItem) -> dict[str, Any]:
    runs = [[len(list(group)), list(cut)] for cut, group in groupby(chunk.shape for chunk in item.chunks)]
    return {
        "codec": item.encoding.config(), "dtype": dtype_name(item.dtype), "shape": list(item.shape),
        "storage": item.storage, "parts": parts_json(item.parts), "chunks": runs,
    }  # fmt: skip


def _attributes_json(items: Sequence[StoredItem]) -> dict[str, Any]:
    keys: dict[str, tuple[list[int], list[Any]]] = {}
    for i, item in enumerate(items):
        for key, value in item.attributes.items():
            at, values = keys.setdefault(key, ([], []))
            at.append(i)
            values.append(value)
    return {
        key: {"values": values} if len(at) == len(items) else {"items": at, "values": values}
        for key, (at, values) in keys.items()
    }


def _records_json(items: Sequence[StoredItem]) -> dict[str, Any]:
    """All records in file order: by shard and place."""
    records: list[tuple[int, int, int, str, int]] = []
    for i, item in enumerate(items):
        start = item.start
        for chunk in item.chunks if item.storage == PACKED else ():
            records.append((item.shard, start, chunk.nbytes, chunk.checksums[0], 0))
            start += chunk.nbytes
        if item.record is not None and item.record.items[0] == i:
            r = item.record
            records.append((r.shard, r.start, r.nbytes, r.checksum, len(r.items)))
    records.sort(key=lambda record: record[:2])
    return {
        "nbytes": [record[2] for record in records],
        "checksums": "".join(record[3] for record in records),
        "shared": [[i, record[4]] for i, record in enumerate(records) if record[4]],
    }


def read_items(top: Fields, shards: int, newer: bool, limits: Limits) -> tuple[StoredItem, ...]:
    """The items, from a manifest's fields `forms`, `items`, `records` and `plain`, checked.

    Raises FormatError and its subclasses.
    """
    fields, records = Fields(top.take("items", dict), "manifest: items"), Fields(top.take("records", dict), "records")
    names = _list(fields, "name", str)
    limits.check("manifest: items", len(names), limits.max_items)
    sizes, checksums = _list(records, "nbytes", int), _checksums(records.take("checksums", str), "records")
    plain = _checksums(top.take("plain", str), "plain")
    forms = _forms(top.take("forms", list), MAX_CHUNKS + len(sizes) + len(plain), newer, limits)
    numbers = _list(fields, "form", int)
    if len(numbers) != len(names) or (numbers and not 0 <= min(numbers) <= max(numbers) < len(forms)):
        raise FormatError("manifest: items: there is not one form for each name")
    of = [forms[number] for number in numbers]
    limits.check("decoded bytes", sum(_decoded(form) for form in of), limits.max_decoded_bytes)
    limits.check("chunks", sum(len(form.chunks) for form in of), MAX_CHUNKS + len(sizes) + len(plain))
    shard_of = _shards(_list(fields, "shards", int), len(names), shards)
    entries = dict(_pairs(fields, "entry", len(names), str))
    attributes = _attributes(fields, len(names))
    companions = dict(_pairs(fields, "companions", len(names), dict))
    fields.done(newer)
    places = RecordTable(of, shard_of, sizes, checksums, _pairs(records, "shared", len(sizes), int))
    records.done(newer)
    return _items(names, of, shard_of, entries, companions, attributes, places, iter(plain))


def _items(
    names: Sequence[str],
    of: Sequence[ChunkedTensor],
    shard_of: Sequence[int],
    entries: Mapping[int, str],
    companions: Mapping[int, dict[str, Any]],
    attributes: Sequence[Mapping[str, Any]],
    places: RecordTable,
    plain: Iterator[str],
) -> tuple[StoredItem, ...]:
    items = []
    for i, (name, form, shard) in enumerate(zip(names, of, shard_of, strict=True)):
        tensor, record, start, entry = form.tensor, None, 0, packed_entry(shard)
        if tensor.storage == PACKED:
            start, chunks = places.packed(i)
        elif tensor.storage == SHARED:
            record, chunks = places.shared(i)
        else:
            entry, chunks = entries.get(i, name), _plain_chunks(form, plain)
        items.append(
            StoredItem(
                name,
                tensor.encoding,
                tensor.shape,
                tensor.dtype,
                tensor.storage,
                tensor.parts,
                chunks,
                attributes[i],
                shard,
                entry,
                start,
                record,
                read_companions(companions.get(i, {}), tensor.encoding.codec, f"manifest: item {name[:200]!r}"),
            )
        )
    if next(plain, None) is not None:
        raise FormatError("manifest: plain: more checksums than plain chunks have parts")
    return tuple(items)


def _plain_chunks(form: ChunkedTensor, plain: Iterator[str]) -> tuple[StoredChunk, ...]:
    count, chunks = len(form.tensor.parts), []
    for chunk, size in zip(form.chunks, form.sizes, strict=True):
        of_chunk = tuple(checksum for _, checksum in zip(range(count), plain, strict=False))
        if len(of_chunk) != count:
            raise FormatError("manifest: plain: fewer checksums than plain chunks have parts")
        chunks.append(StoredChunk(chunk.start, chunk.stop, chunk.shape, size, of_chunk))
    return tuple(chunks)


def _forms(values: list[Any], most_chunks: int, newer: bool, limits: Limits) -> list[ChunkedTensor]:
    limits.check("manifest: forms", len(values), limits.max_items)
    forms = []
    for i, value in enumerate(values):
        fields = Fields(value, f"manifest: form {i}")
        tensor = DeclaredTensor.read(fields, (PLAIN, PACKED, SHARED), newer, limits)
        runs = [_run(run, fields.where) for run in fields.take("chunks", list)]
        fields.done(newer)
        count = sum(length for length, _ in runs)
        most_chunks -= count
        if most_chunks < 0 or (tensor.storage == SHARED and (count != 1 or not tensor.parts)):
            raise FormatError(f"{fields.where}: {count:,} chunks")
        chunks = tensor.cut((cut for length, cut in runs for _ in range(length)), count, fields.where, limits)
        sizes = {c.shape: tensor.encoding.nbytes(c.shape, tensor.dtype) for c in chunks}
        forms.append(ChunkedTensor(tensor, chunks, [sizes[c.shape] for c in chunks]))
    return forms


def _run(value: Any, where: str) -> tuple[int, tuple[int, ...]]:
    if not isinstance(value, list) or len(value) != 2 or type(value[0]) is not int or type(value[1]) is not list:
        raise FormatError(f"{where}: chunks are runs [number, shape], found {str(value)[:80]}")
    if value[0] < 1:
        raise FormatError(f"{where}: a run of {value[0]} chunks")
    return value[0], shape(value[1], where)


def _decoded(form: ChunkedTensor) -> int:
    return form.chunks[-1].stop * form.tensor.dtype.itemsize


def _shards(counts: Sequence[int], items: int, shards: int) -> list[int]:
    if len(counts) != shards or any(count < 0 for count in counts) or sum(counts) != items:
        raise FormatError(
            f"manifest: items: {len(counts)} shards with {sum(counts):,} items, of {shards} and {items:,}"
        )
    return [shard for shard, count in enumerate(counts) for _ in range(count)]


def _attributes(fields: Fields, items: int) -> list[dict[str, Any]]:
    by_item: list[dict[str, Any]] = [{} for _ in range(items)]
    for key, value in fields.take("attributes", dict).items():
        column = Fields(value, f"manifest: attribute {key[:80]!r}")
        values = column.take("values", list)
        at = _list(column, "items", int) if "items" in column.values else list(range(items))
        column.done(newer=False)
        if len(at) != len(values) or any(not 0 <= i < items for i in at) or len(set(at)) != len(at):
            raise FormatError(f"{column.where}: {len(values)} values for {len(at)} of {items} items")
        for i, attribute in zip(at, values, strict=True):
            by_item[i][key] = attribute
    return by_item


def _list(fields: Fields, key: str, kind: type) -> list[Any]:
    values: list[Any] = fields.take(key, list)
    if any(type(value) is not kind for value in values):
        raise FormatError(f"{fields.where}: {key!r} holds something that is no {kind.__name__}")
    return values


def _pairs(fields: Fields, key: str, below: int, kind: type) -> list[tuple[int, Any]]:
    """Pairs (rising number below `below`, value)."""
    pairs, last = [], -1
    for row in fields.take(key, list):
        if type(row) is not list or len(row) != 2 or type(row[0]) is not int or type(row[1]) is not kind:
            raise FormatError(f"{fields.where}: {key!r} holds pairs, found {str(row)[:80]}")
        if not last < row[0] < below:
            raise FormatError(f"{fields.where}: {key!r} has {row[0]} after {last}, of {below}")
        last = row[0]
        pairs.append((row[0], row[1]))
    return pairs


def _checksums(text: str, where: str) -> list[str]:
    if len(text) % 16 or not _HEX.fullmatch(text):
        raise FormatError(f"manifest: {where}: checksums are 16 lower-case hexadecimal digits each")
    return [text[i : i + 16] for i in range(0, len(text), 16)]
