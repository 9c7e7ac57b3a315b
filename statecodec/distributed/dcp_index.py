"""The index of a checkpoint that StatecodecWriter wrote, as JSON: what torch.distributed.checkpoint (DCP) reads of it.

DCP's own `.metadata` is a pickle, which can run code when it is loaded; this index cannot.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from statecodec import dtypes
from statecodec.distributed import INDEX
from statecodec.distributed.folders import SaveFolder
from statecodec.errors import FormatError, UnsupportedVersion
from statecodec.files import read_bytes
from statecodec.limits import Limits
from statecodec.strict import dump_json, parse_json

_VERSION = 1
_FILE = re.compile(r"rank-\d{1,6}-[0-9a-f]{16}\.sc\.safetensors")
_BEGUN = re.compile(rf"\.?({_FILE.pattern}|{re.escape(INDEX)})\.[0-9a-f]{{16}}\.tmp")


@dataclass(frozen=True)
class ItemLocation:
    """Where an item of a DCP checkpoint is stored: the compressed file of a rank, and the item's name in that file."""

    file: str
    name: str


def rank_file(rank: int, save: str) -> str:
    """The name of a rank's file in one save, told from those of earlier saves by 16 hex digits."""
    return f"rank-{rank}-{save}.sc.safetensors"


def leftovers(folder: SaveFolder, kept: Container[str]) -> list[str]:
    """Files that other saves left in a folder, of ranks that are not kept or of killed writers. Raises OSError."""
    return [name for name in folder.names() if _BEGUN.fullmatch(name) or (_FILE.fullmatch(name) and name not in kept)]


def to_bytes(metadata: Metadata, places: Mapping[MetadataIndex, ItemLocation], digests: Mapping[str, str]) -> bytes:
    """The index of a checkpoint. `digests`: file -> the XXH3-128 of its manifest."""
    files = sorted(digests)
    numbers = {name: i for i, name in enumerate(files)}
    items: dict[str, Any] = {}
    for fqn, about in metadata.state_dict_metadata.items():
        if isinstance(about, BytesStorageMetadata):
            place = places[MetadataIndex(fqn)]
            items[fqn] = {"at": [numbers[place.file], place.name]}
            continue
        chunks = []
        for chunk in about.chunks:
            place = places[MetadataIndex(fqn, chunk.offsets)]
            chunks.append([list(chunk.offsets), list(chunk.sizes), numbers[place.file], place.name])
        items[fqn] = {"dtype": dtypes.of(about.properties.dtype).name, "shape": list(about.size), "chunks": chunks}
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    document = {
        "statecodec_dcp": _VERSION,
        "files": [[name, digests[name]] for name in files],
        "items": items,
        "paths": {fqn: list(path) for fqn, path in paths.items()},
    }
    return dump_json(document)


@dataclass(frozen=True)
class FolderIndex:
    """A checkpoint's index, read: DCP's metadata with a `ItemLocation` for every item, and the digest of every file."""

    metadata: Metadata
    digests: Mapping[str, str]


def read(folder: SaveFolder) -> FolderIndex:
    """Read and check the index of a checkpoint. Raises FormatError and its subclasses."""
    path, limits = f"{folder}/{INDEX}", Limits()
    try:
        with contextlib.closing(folder.open(INDEX)) as file:
            limits.check(f"{path}: bytes", file.size, limits.max_manifest_bytes)
            data = read_bytes(file, 0, file.size)
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: {why}: no checkpoint was completed in {folder}") from error
    value = parse_json(bytes(data), INDEX, limits)
    if not isinstance(value, dict) or "statecodec_dcp" not in value:
        raise FormatError(f"{path} is no index of a checkpoint")
    if value["statecodec_dcp"] != _VERSION:
        raise UnsupportedVersion(f"{path}: version {str(value['statecodec_dcp'])[:20]}; this reader knows {_VERSION}")
    try:
        files = [(str(name), str(digest)) for name, digest in value["files"]]
        for name, _ in files:
            if not _FILE.fullmatch(name):
                raise FormatError(f"{path}: {name[:80]!r} is no name of a rank's file")
        return _metadata(value, [name for name, _ in files], dict(files))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise FormatError(f"{path}: damaged: {type(error).__name__}: {str(error)[:100]}") from error


def _metadata(value: Mapping[str, Any], files: Sequence[str], digests: Mapping[str, str]) -> FolderIndex:
    about: dict[str, Any] = {}
    places: dict[MetadataIndex, ItemLocation] = {}
    for fqn, item in value["items"].items():
        if "at" in item:
            number, name = item["at"]
            about[fqn] = BytesStorageMetadata()
            places[MetadataIndex(fqn)] = ItemLocation(files[_size(number)], str(name))
            continue
        shape, chunks = _sizes(item["shape"]), []
        for offsets, sizes, number, name in item["chunks"]:
            chunk = ChunkStorageMetadata(_sizes(offsets), _sizes(sizes))
            if not len(chunk.offsets) == len(chunk.sizes) == len(shape) or any(
                start + size > whole for start, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
            ):
                raise ValueError(f"a chunk of {fqn[:80]!r} lies outside of it")
            chunks.append(chunk)
            places[MetadataIndex(fqn, chunk.offsets)] = ItemLocation(files[_size(number)], str(name))
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise ValueError(f"the chunks of {fqn[:80]!r} do not add up to it")
        properties = TensorProperties(dtype=dtypes.TORCH[item["dtype"]].torch)
        about[fqn] = TensorStorageMetadata(properties=properties, size=shape, chunks=chunks)
    paths = {fqn: tuple(path) for fqn, path in value["paths"].items()}
    return FolderIndex(Metadata(about, planner_data=paths or None, storage_data=places), digests)


def _sizes(values: Any) -> torch.Size:
    return torch.Size([_size(value) for value in values])


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]} is no size")
    return value
