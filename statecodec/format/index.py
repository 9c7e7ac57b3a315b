"""The Hugging Face index of a sharded output: a JSON file that says which shard holds which entry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statecodec.errors import FormatError
from statecodec.format.container import MANIFEST_ENTRY
from statecodec.format.manifest import StoredItem, is_file_name

INDEX_SUFFIX = ".safetensors.index.json"


def index_json(items: Sequence[StoredItem], files: Sequence[str], total_size: int, digest: str) -> dict[str, Any]:
    """The whole index: it follows from the manifest, its digest and the size of all data sections."""
    weight_map = {name: files[item.shard] for item in items for name in item.entries()}
    weight_map[MANIFEST_ENTRY] = files[-1]
    return {"metadata": {"total_size": total_size, "statecodec.manifest": digest}, "weight_map": weight_map}


def last_shard(value: Any, index: Path) -> str:
    """The file name of the shard with the manifest, from an untrusted index."""
    names = value.get("weight_map") if isinstance(value, dict) else None
    name = names.get(MANIFEST_ENTRY) if isinstance(names, dict) else None
    if not isinstance(name, str) or not is_file_name(name):
        raise FormatError(f"{index.name}: its weight_map names no file for {MANIFEST_ENTRY}: not of statecodec")
    return name
