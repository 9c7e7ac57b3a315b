"""The entries of a file's shards, as they follow from its items, and the Hugging Face index that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statecodec.errors import FormatError
from statecodec.format.container import MANIFEST_ENTRY
from statecodec.format.items import PLAIN, StoredItem
from statecodec.format.manifest import is_file_name

INDEX_SUFFIX = ".safetensors.index.json"

Entries = dict[str, tuple[str, tuple[int, ...]]]


def expected_entries(items: Sequence[StoredItem], shards: int) -> list[Entries]:
    """The safetensors entries of every shard but for the manifest: name -> (dtype, shape).

    Raises FormatError for two items with one entry.
    """
    plain: list[Entries] = [{} for _ in range(shards)]
    packed: list[dict[str, int]] = [{} for _ in range(shards)]
    for item in items:
        if item.storage == PLAIN:
            entries = item.plain_entries()
            if entries.keys() & plain[item.shard].keys():
                raise FormatError(f"item {item.name[:200]!r}: another item has its entry")
            plain[item.shard].update(entries)
        else:
            packed[item.shard][item.entry] = packed[item.shard].get(item.entry, 0) + item.stored_nbytes
    for entries, sizes in zip(plain, packed, strict=True):
        if entries.keys() & sizes.keys() or MANIFEST_ENTRY in entries or MANIFEST_ENTRY in sizes:
            raise FormatError("an item has the entry of another, or of the manifest")
        entries.update({name: ("U8", (size,)) for name, size in sizes.items()})
    return plain


def index_json(items: Sequence[StoredItem], files: Sequence[str], total_size: int, digest: str) -> dict[str, Any]:
    """The whole index: it follows from the manifest, its digest and the size of all data sections."""
    entries = expected_entries(items, len(files))
    weight_map = {name: file for file, names in zip(files, entries, strict=True) for name in names}
    weight_map[MANIFEST_ENTRY] = files[-1]
    return {"metadata": {"total_size": total_size, "statecodec.manifest": digest}, "weight_map": weight_map}


def last_shard(value: Any, index: Path) -> str:
    """The file name of the shard with the manifest, from an untrusted index."""
    names = value.get("weight_map") if isinstance(value, dict) else None
    name = names.get(MANIFEST_ENTRY) if isinstance(names, dict) else None
    if not isinstance(name, str) or not is_file_name(name):
        raise FormatError(f"{index.name}: its weight_map names no file for {MANIFEST_ENTRY}: not of statecodec")
    return name
