"""Locates the tensors in a safetensors file, with a header check of our own.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, a JSON object of
name -> {dtype, shape, data_offsets} plus an optional `__metadata__` of strings, then the byte buffer without holes.
Stricter than the published reader: duplicate keys and shapes that no memory could hold are refused.
"""

from __future__ import annotations

import math
from typing import Any, Final

from statecodec.dtypes import SAFETENSORS, SAFETENSORS_SUB_BYTE_BITS, UINT8
from statecodec.errors import FormatError, LimitExceeded, MalformedCheckpoint
from statecodec.files import ByteSource
from statecodec.layouts.graph import Graph, Span, contiguous
from statecodec.layouts.listing import Listing
from statecodec.layouts.objects import window
from statecodec.layouts.payload import Payload
from statecodec.layouts.pickle.nodes import DictNode, StorageNode, TensorNode
from statecodec.layouts.protocol import Claim, Located
from statecodec.layouts.walk import most_tensors
from statecodec.limits import Limits
from statecodec.strict import parse_json

name: Final = "safetensors"

MAX_HEADER_BYTES: Final = 100_000_000
_MAX_RANK: Final = 64
_INT64: Final = 1 << 63


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file's first bytes look like a safetensors header; the length is not verified yet."""
    return (
        size >= 10 and len(head) >= 9 and head[8:9] == b"{" and (int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES)
    )


def read_header(source: ByteSource) -> tuple[dict[str, Any], int]:
    """(entries by name in header order, without `__metadata__`; file offset of the byte buffer).

    Raises MalformedCheckpoint.
    """
    if source.size < 8:
        raise MalformedCheckpoint("too short to be a safetensors file")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > MAX_HEADER_BYTES or 8 + length > source.size:
        raise MalformedCheckpoint(
            f"safetensors header is said to have {length} bytes, the file has {source.size}; it is truncated or damaged"
        )
    text = source.read(8, length)
    try:
        limits = Limits(max_json_values=6 * most_tensors(length), max_json_depth=8)
        header = parse_json(text, "safetensors header", limits)
    except LimitExceeded as error:
        raise MalformedCheckpoint(f"{error}, which no safetensors header of its length needs") from None
    except FormatError as error:
        raise MalformedCheckpoint(str(error)) from None
    if not isinstance(header, dict):
        raise MalformedCheckpoint("safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedCheckpoint("safetensors __metadata__ is not an object of strings")
    return header, 8 + length


def _tensor(name: str, entry: Any, buffer: int) -> tuple[TensorNode, int, int]:
    """(node, begin, end) of one header entry, checked."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedCheckpoint(f"safetensors entry {name!r:.80} is not {{dtype, shape, data_offsets}}")
    shape, offsets, dtype_name = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > _MAX_RANK:
        raise MalformedCheckpoint(f"safetensors entry {name!r:.80}: shape or data_offsets are not lists of sizes")
    begin, end = offsets
    # Zeros are left out of the product, so that a shape like [2**60, 0] is refused.
    if math.prod(n for n in shape if n) >= _INT64:
        raise MalformedCheckpoint(f"safetensors entry {name!r:.80}: shape {shape} is beyond any memory")
    numel = math.prod(shape)
    if not isinstance(dtype_name, str):
        raise MalformedCheckpoint(f"safetensors entry {name!r:.80}: its dtype is no string")
    left, dtype, view_shape = 0, UINT8, (end - begin,)  # a dtype that is not known is carried as bytes
    nbytes = max(end - begin, 0)
    if dtype_name in SAFETENSORS_SUB_BYTE_BITS:
        nbytes, left = divmod(numel * SAFETENSORS_SUB_BYTE_BITS[dtype_name], 8)
    elif dtype_name in SAFETENSORS:
        dtype, view_shape = SAFETENSORS[dtype_name], tuple(shape)
        nbytes = numel * dtype.itemsize
    if left or end - begin != nbytes or end > buffer:
        raise MalformedCheckpoint(
            f"safetensors entry {name!r:.80}: {dtype_name} {shape} needs {nbytes} bytes, not {offsets} of {buffer}"
        )
    storage = StorageNode(name, dtype, "cpu", nbytes // dtype.itemsize, untyped=False)
    return TensorNode(storage, dtype, view_shape, contiguous(view_shape), 0), begin, end


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _INT64 for n in value)


def read_tensors(source: ByteSource) -> tuple[DictNode, dict[str, Span]]:
    """The file as a dict of tensor nodes, in file order, and where each lies. Raises MalformedCheckpoint."""
    header, start = read_header(source)
    buffer = source.size - start
    entries = [(*_tensor(name, entry, buffer), name) for name, entry in header.items()]
    entries.sort(key=lambda t: (t[1], t[2]))
    root, spans, at = DictNode(), {}, 0
    for node, begin, end, name in entries:
        if begin != at:
            problem = "overlaps the tensor before it" if begin < at else f"leaves {begin - at} bytes unused before it"
            raise MalformedCheckpoint(f"safetensors entry {name!r:.80} {problem}")
        at = end
        root.items.append((name, node))
        spans[name] = Span(start + begin, end - begin)
    if at != buffer:
        raise MalformedCheckpoint(f"{buffer - at} bytes behind the last tensor of the safetensors file")
    return root, spans


def claims(listing: Listing) -> Claim | None:
    """A file that begins with the length of a JSON object, and with that object."""
    file = listing.only
    return Claim((file.path,)) if file is not None and is_safetensors(file.magic, file.nbytes) else None


def locate(listing: Listing) -> Located:
    """Read the header, no payload (but one-element tensors). Raises MalformedCheckpoint."""
    file = listing.only
    assert file is not None
    with file.open() as source:
        root, spans = read_tensors(source)
        graph = Graph(root, spans, most_tensors(file.nbytes), ordered=False)
        return graph.located(name, file, source, listing.prefix(file.path))


def tree(listing: Listing, read: Payload) -> Any:
    """{name: tensor}, as safetensors.torch.load_file gives it. Raises MalformedCheckpoint."""
    file = listing.only
    assert file is not None
    with file.open() as source:
        root, spans = read_tensors(source)
    return {
        key: window(read(file.path, spans[key].offset, spans[key].nbytes), node.dtype, node.shape, node.stride, 0)
        for key, node in root.items
    }
