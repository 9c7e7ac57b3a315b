"""Opening the files of an output: headers, manifest and index are read, and must say the same."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from statecodec.errors import CorruptFile, FormatError
from statecodec.format.container import MANIFEST_ENTRY, Header
from statecodec.format.index import INDEX_SUFFIX, expected_entries, index_json, last_shard
from statecodec.format.manifest import Manifest
from statecodec.format.open_files import OpenFiles
from statecodec.limits import Limits
from statecodec.strict import parse_json


@dataclass(frozen=True)
class OpenedOutput:
    """What the headers and the manifest of an output say."""

    manifest: Manifest
    headers: Sequence[Header]
    files: tuple[Path, ...]
    nbytes: int


def open_output(path: Path, files: OpenFiles, limits: Limits) -> OpenedOutput:
    """Open the files of an output, and check that they belong together.

    Args:
        path: A file, or the index of a sharded output, or the name that the output was written under.
        files: Where the files are opened, in the order of the shards.
        limits: What is accepted before anything is allocated.

    Raises:
        FormatError: If it is no such output, or damaged, or beyond the limits (its subclasses say which).
    """
    index = _index_path(path, files)
    value = None if index is None else parse_json(files.content(index, limits), index.name, limits)
    last = path if index is None else index.with_name(last_shard(value, index))
    header = files.open_shard(last, limits)
    manifest = Manifest.parse(_manifest_bytes(header, last, files, limits), header.version, header.newer, limits)
    headers = [header]
    for i, other in enumerate(manifest.shards):
        shard = files.open_shard(last.with_name(other.file), limits)
        if shard.digest != other.header:
            raise CorruptFile(f"{other.file}: not the shard that {last.name} was written with")
        headers.insert(i, shard)
    files.last_is_first()
    paths = tuple(last.with_name(name) for name in [*(s.file for s in manifest.shards), last.name])
    opened = OpenedOutput(manifest, headers, paths, sum(files.sizes))
    _check_entries(opened)
    if index is not None:
        _check_index(opened, value, index)
    return opened


def _index_path(path: Path, files: OpenFiles) -> Path | None:
    if path.name.endswith(INDEX_SUFFIX):
        return path
    if not files.local:
        return None
    index = path.with_name(path.name.removesuffix(".safetensors") + INDEX_SUFFIX)
    return index if not os.path.lexists(path) and os.path.lexists(index) else None


def _manifest_bytes(header: Header, path: Path, files: OpenFiles, limits: Limits) -> bytes:
    data = files.manifest(0, header, path.name, limits)
    digest = header.metadata.get("statecodec.manifest")
    if data is None or digest is None:
        shard = header.metadata.get("statecodec.shard", "?")
        raise FormatError(f"{path.name} is shard {shard[:20]}, without manifest: open the {INDEX_SUFFIX} beside it")
    if xxhash.xxh3_128_hexdigest(data) != digest:
        raise CorruptFile(f"{path.name}: the manifest's checksum does not match: the file is damaged")
    return data


def _check_entries(opened: OpenedOutput) -> None:
    """The header's entries must be exactly those of the manifest."""
    expected = expected_entries(opened.manifest.items, len(opened.headers))
    for i, header in enumerate(opened.headers):
        entries = {e.name: (e.dtype, e.shape) for e in header.entries.values()}
        if i == len(opened.headers) - 1:
            entries.pop(MANIFEST_ENTRY)
        if entries != expected[i]:
            wrong = min(k for k in entries.keys() | expected[i].keys() if entries.get(k) != expected[i].get(k))
            raise FormatError(
                f"{opened.files[i].name}: entry {wrong[:200]!r} is {entries.get(wrong)}, "
                f"the manifest says {expected[i].get(wrong)}"
            )


def _check_index(opened: OpenedOutput, value: Any, path: Path) -> None:
    digest = opened.headers[-1].metadata["statecodec.manifest"]
    total = opened.nbytes - sum(header.data for header in opened.headers)
    expected = index_json(opened.manifest.items, [file.name for file in opened.files], total, digest)
    if json.dumps(value, sort_keys=True) != json.dumps(expected, sort_keys=True):
        raise CorruptFile(f"{path.name} does not describe the shards beside it: damaged, or of another run")
