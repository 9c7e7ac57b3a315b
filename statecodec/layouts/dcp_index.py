"""Reads the `.metadata` of a DCP folder: a pickle that dcp.load runs, and that is only read here.

It says for every tensor its dtype, size and chunks (a box each); for every chunk and every other object in which file
and at which bytes it lies; and by which path of keys the saved object held it. All of it is checked: against itself,
and against the files that are there.

Source: torch/distributed/checkpoint/metadata.py, filesystem.py and _nested_dict.py of torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any, Final

from statecodec.dtypes import DType
from statecodec.errors import MalformedCheckpoint, UnknownLayout
from statecodec.layouts.base import Box, Shape
from statecodec.layouts.listing import Listing
from statecodec.layouts.parts import are_whole
from statecodec.layouts.pickle.nodes import DictNode, Opaque
from statecodec.layouts.pickle.reader import MAX_PICKLE_BYTES, read_pickle
from statecodec.layouts.walk import most_tensors
from statecodec.names import shown

INDEX: Final = ".metadata"
_MAX_RANK: Final = 64
_MAX_DEPTH: Final = 64


@dataclass(frozen=True, slots=True)
class DcpItem:
    """What lies at file[offset:offset+nbytes]: a chunk of a tensor, or (`box` is None) a value of its own."""

    key: str
    box: Box | None
    file: str
    offset: int
    nbytes: int
    plain: bool
    """Not transformed (compressed) by a storage extension."""


@dataclass(frozen=True, slots=True)
class TensorAbout:
    """What `.metadata` says of one tensor: dtype, shape and chunks."""

    dtype: DType
    size: Shape


@dataclass(frozen=True)
class DcpIndex:
    """`.metadata`, checked against itself. Items are by file and offset."""

    keys: list[str]
    """Of all tensors and values, in order."""
    tensors: dict[str, TensorAbout]
    items: list[DcpItem]
    paths: dict[str, tuple[Any, ...]]
    limit: int


def read_index(listing: Listing) -> DcpIndex:
    """Read and check `.metadata`. Raises LayoutError."""
    file = listing.get(INDEX)
    if file is None or not listing.is_directory:
        error = MalformedCheckpoint if listing.is_directory else UnknownLayout
        raise error(
            f"one file of a DCP checkpoint (torch.distributed.checkpoint); what is needed is its folder, with {INDEX} "
            "and all shards"
        )
    if file.nbytes > MAX_PICKLE_BYTES:
        raise MalformedCheckpoint(f"{INDEX} has {file.nbytes} bytes; more than {MAX_PICKLE_BYTES} are not read")
    with file.open() as source:
        data = source.read(0, file.nbytes)
    fields = _fields(read_pickle(data, INDEX), "Metadata")
    tensors: dict[str, TensorAbout] = {}
    boxes: dict[tuple[str, Shape | None], Box | None] = {}
    described = _dict(fields.get("state_dict_metadata"))
    keys = [key for key, _ in described]
    for key, value in described:
        if type(value) is Opaque and value.name == "BytesStorageMetadata":
            boxes[key, None] = None
            continue
        about = _fields(value, "TensorStorageMetadata")
        tensors[key], tensor_boxes = _tensor(key, about)
        boxes.update(((key, box.offset), box) for box in tensor_boxes)
    items = [_stored(pair, boxes, listing) for pair in _pairs(fields.get("storage_data"))]
    if boxes:
        key, offset = next(iter(boxes))
        raise MalformedCheckpoint(f"{INDEX}: nothing says where {shown(key)!r:.80} {list(offset or ())} is stored")
    items.sort(key=attrgetter("file", "offset"))
    for before, item in pairwise(items):
        if before.file == item.file and before.offset + before.nbytes > item.offset:
            both = f"{shown(before.key)!r:.80} and {shown(item.key)!r:.80}"
            raise MalformedCheckpoint(f"{INDEX}: {both} overlap in {item.file}")
    planned = fields.get("planner_data")
    paths = (
        {k: p for k, p in planned.items if type(k) is str and type(p) is tuple and p}
        if type(planned) is DictNode
        else {}
    )
    return DcpIndex(keys, tensors, items, paths, most_tensors(len(data)))


def _fields(node: Any, kind: str) -> dict[str, Any]:
    if type(node) is not Opaque or node.name != kind or type(node.state) is not DictNode:
        raise MalformedCheckpoint(f"{INDEX}: a {kind} was expected where {node!r:.80} stands")
    return node.state.strings()


def _pairs(node: Any) -> list[tuple[Any, Any]]:
    if type(node) is not DictNode:
        raise MalformedCheckpoint(f"{INDEX}: a dict was expected where {node!r:.80} stands")
    return node.items


def _dict(node: Any) -> list[tuple[str, Any]]:
    pairs = _pairs(node)
    if not all(type(key) is str for key, _ in pairs) or len({key for key, _ in pairs}) != len(pairs):
        raise MalformedCheckpoint(f"{INDEX}: keys that are no text, or there twice")
    return pairs


def _sizes(value: Any, rank: int | None = None) -> Shape:
    sizes = tuple(value) if isinstance(value, tuple) else None
    if sizes is None or len(sizes) > _MAX_RANK or not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
        raise MalformedCheckpoint(f"{INDEX}: a size was expected where {value!r:.80} stands")
    if rank is not None and len(sizes) != rank:
        raise MalformedCheckpoint(f"{INDEX}: a chunk of {len(sizes)} dimensions in a tensor of {rank}")
    return sizes


def _tensor(key: str, about: dict[str, Any]) -> tuple[TensorAbout, list[Box]]:
    """A tensor and its chunks, which cover all of it exactly once."""
    properties, chunks = about.get("properties"), about.get("chunks")
    state = properties.state if type(properties) is Opaque else None
    dtype = state[0] if type(state) is tuple and state else None
    if type(dtype) is not DType or type(chunks) is not list:
        raise MalformedCheckpoint(f"{INDEX}: dtype or chunks of {shown(key)!r:.80} are not understood")
    size = _sizes(about.get("size"))
    boxes = []
    for chunk in chunks:
        fields = _fields(chunk, "ChunkStorageMetadata")
        boxes.append(Box(_sizes(fields.get("offsets"), len(size)), _sizes(fields.get("sizes"), len(size))))
    if not are_whole(size, boxes):
        raise MalformedCheckpoint(f"{INDEX}: the chunks of {shown(key)!r:.80} are not the whole of it, once")
    return TensorAbout(dtype, size), boxes


def _stored(pair: tuple[Any, Any], boxes: dict[tuple[str, Shape | None], Box | None], listing: Listing) -> DcpItem:
    """Where one chunk or value is; takes its box out of `boxes`."""
    index, info = _fields(pair[0], "MetadataIndex"), _fields(pair[1], "_StorageInfo")
    key, file, offset, nbytes = index.get("fqn"), info.get("relative_path"), info.get("offset"), info.get("length")
    at = None if index.get("offset") is None else _sizes(index["offset"])
    if type(key) is not str or (key, at) not in boxes:
        raise MalformedCheckpoint(
            f"{INDEX}: places {shown(str(key))!r:.80} {list(at or ())}, which it does not describe, or twice"
        )
    listed = listing.get(file) if type(file) is str and "/" not in file else None
    if listed is None or file == INDEX:
        raise MalformedCheckpoint(f"{INDEX}: {shown(key)!r:.80} is in {file!r:.80}, which is no shard in the folder")
    if type(offset) is not int or type(nbytes) is not int or not 0 <= offset <= offset + nbytes <= listed.nbytes:
        where = f"{offset!r:.20} with {nbytes!r:.20}"
        raise MalformedCheckpoint(f"{file} has {listed.nbytes} bytes; {INDEX} places {shown(key)!r:.80} at {where}")
    return DcpItem(key, boxes.pop((key, at)), listed.path, offset, nbytes, plain=not info.get("transform_descriptors"))


def nested(index: DcpIndex, values: dict[str, Any]) -> dict[str, Any]:
    """Values at the places where the saved object held them: text is a key of a dict, a number an index of a list."""
    root: dict[str, Any] = {}
    for key, value in values.items():
        path = index.paths.get(key, (key,))
        if len(path) > _MAX_DEPTH or not all(type(k) is str or (type(k) is int and 0 <= k < len(values)) for k in path):
            raise MalformedCheckpoint(f"{INDEX}: {shown(key)!r:.80} is at a path that no object has")
        at: Any = root
        for step, following in zip(path, (*path[1:], None), strict=True):
            if type(at) is list and type(step) is int:
                at.extend([None] * (step + 1 - len(at)))
            elif type(at) is not dict or type(step) is not str:
                raise MalformedCheckpoint(f"{INDEX}: {shown(key)!r:.80} is at a path through something else")
            if following is None and (at[step] is not None if type(at) is list else step in at):
                raise MalformedCheckpoint(f"{INDEX}: {shown(key)!r:.80} is where something else is")
            if following is None:
                at[step] = value
            elif type(at) is list:
                at[step] = at[step] if at[step] is not None else [] if type(following) is int else {}
                at = at[step]
            else:
                at = at.setdefault(step, [] if type(following) is int else {})
    return root
