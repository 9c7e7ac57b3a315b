"""Writing files for tests, and files that lie: correct checksums over chosen contents."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import xxhash
import zstandard
from torch import Tensor

from statecodec import dtypes
from statecodec.buffers import Pool
from statecodec.codecs import Codec, Encoding, Raw, parse
from statecodec.codecs.chunking import chunks
from statecodec.dtypes import of
from statecodec.format import ItemSpec, Packing, Writer, Written
from statecodec.format.entry_types import ITEMSIZE, entry_type
from statecodec.format.packing import encode_record


def sample(seed: int = 0) -> dict[str, tuple[Tensor, Codec]]:
    """Tensors of many kinds, small, each with a codec."""
    g = torch.Generator().manual_seed(seed)
    raw = Raw()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * 0.02

    return {
        "w": (normal(60, 50), raw),
        "w16": (normal(33, 70).bfloat16(), raw),
        "w64": (normal(700).double(), raw),
        "ids": (torch.arange(3000), raw),
        "mask": (normal(5000) > 0, raw),
        "zeros": (torch.zeros(64, 64), raw),
        "noise": (torch.randint(0, 256, (6000,), generator=g).to(torch.uint8), raw),
        "step": (torch.tensor(3.0), raw),
        "empty": (torch.empty(0, 5), raw),
        "c": (normal(300, 2).to(torch.complex128), raw),
        "m": (normal(40, 130), parse("companded(curve=softsign,bits=8,group=32)")),
        "v": (normal(40, 130).square(), parse("companded(curve=log)")),
        "s": (normal(64, 33), parse("split")),
        "gone": (normal(10, 10), parse("dropped")),
        "u": (normal(70, 90), parse("uniform(step=0.0001)")),
        "l": (normal(130, 40).square(), parse("logarithmic(per_octave=2)")),
        'a/very long name \u00e9\u4e2d with "quotes" and \n': (normal(5), raw),
    }


def write(
    path: Path,
    tensors: Mapping[str, tuple[Tensor, Codec]],
    *,
    packing: str = "zstd",
    max_shard_size: int | None = None,
    force: bool = False,
    document: dict[str, Any] | None = None,
    companions: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> Written:
    """Write tensors with their codecs; `companions` of items by name."""
    items = [
        ItemSpec(k, Encoding(c), tuple(t.shape), of(t.dtype), {"role": "other"}, companions.get(k, {}))
        for k, (t, c) in tensors.items()
    ]
    with Writer(path, items, packing=packing, max_shard_size=max_shard_size, force=force) as writer:
        for i, (tensor, codec) in enumerate(tensors.values()):
            for chunk in writer.chunks(i):
                piece = tensor.reshape(-1)[chunk.start : chunk.stop].view(chunk.shape)
                others = {role: tensors[name] for role, name in items[i].companions.items()}
                beside = {k: c.encode(t).decode() if codec.needs_decoded else t for k, (t, c) in others.items()}
                given = {role: other.reshape(-1)[chunk.start : chunk.stop] for role, other in beside.items()}
                writer.append(writer.pack(i, chunk, codec.encode(piece, "reference", given).parts))
        return writer.close({"note": "test"} if document is None else document)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def split_file(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data section) of a safetensors file."""
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def join_file(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    """A file with a correct header digest, whatever the header says."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    )
    key = b'"statecodec.header":"'
    at = text.find(key) + len(key)
    if at >= len(key):
        text = text[:at] + b"0" * 16 + text[at + 16 :]
        text = text[:at] + xxhash.xxh3_64_hexdigest(text).encode() + text[at + 16 :]
    return struct.pack("<Q", len(text)) + text + body


def manifest_text(data: bytes) -> bytes:
    """The JSON text of a manifest, whether compressed or not."""
    return data if data.startswith(b"{") else zstandard.decompress(data)


def manifest(path: Path) -> dict[str, Any]:
    """The manifest of a file that holds one."""
    header, body = split_file(path.read_bytes())
    start, stop = header["__manifest__"]["data_offsets"]
    value: dict[str, Any] = json.loads(manifest_text(body[start:stop]))
    return value


def forge(data: bytes, change: Callable[[dict[str, Any]], Any], raw: Callable[[bytes], bytes] | None = None) -> bytes:
    """A single-file output with its manifest changed and every digest over it made right again."""
    header, body = split_file(data)
    start, stop = header["__manifest__"]["data_offsets"]
    manifest = json.loads(manifest_text(body[start:stop]))
    manifest = change(manifest) or manifest
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False).encode()
    text = raw(text) if raw else text
    header["__manifest__"] = {"dtype": "U8", "shape": [len(text)], "data_offsets": [start, start + len(text)]}
    header["__metadata__"]["statecodec.manifest"] = xxhash.xxh3_128_hexdigest(text)
    return join_file(header, body[:start] + text)


def build(
    items: Sequence[dict[str, Any]],
    entries: Mapping[str, tuple[str, list[int], bytes]],
    document: Mapping[str, Any] = MappingProxyType({}),
    version: str = "1.0",
) -> bytes:
    """A whole file of format 1.x from chosen manifest items and entries, with all digests right.

    Entries are name -> dtype, shape, bytes.
    """
    manifest = {
        "format": "statecodec", "format_version": [int(n) for n in version.split(".")], "writer": "test", "shards": [],
        "items": list(items), "document": dict(document),
    }  # fmt: skip
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False).encode()
    metadata = {"format": "statecodec", "statecodec.version": version, "statecodec.header": "0" * 16}
    header: dict[str, Any] = {"__metadata__": {**metadata, "statecodec.manifest": xxhash.xxh3_128_hexdigest(text)}}
    body = b""
    for name, (dtype, shape, data) in {**entries, "__manifest__": ("U8", [len(text)], text)}.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return join_file(header, body)


def write_old(
    path: Path,
    tensors: Mapping[str, tuple[Tensor, Codec]],
    *,
    packing: str = "zstd",
    document: dict[str, Any] | None = None,
    companions: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> Path:
    """A file of format 1.1, which is only read now: rows of items, an entry for each packed one, small ones plain."""
    plain: dict[str, tuple[str, list[int], bytes]] = {}
    packed: dict[str, tuple[str, list[int], bytes]] = {}
    items = []
    for name, (tensor, codec) in tensors.items():
        shape, named = tuple(tensor.shape), companions.get(name, {})
        specs, storage = codec.parts(shape, of(tensor.dtype)), "plain"
        if packing != "none" and codec.nbytes(shape, of(tensor.dtype)) >= 4096:
            storage = "packed"
        rows, data = [], dict.fromkeys(specs, b"")
        records = b""
        for chunk in chunks(codec, shape, of(tensor.dtype)):
            piece = tensor.reshape(-1)[chunk.start : chunk.stop].view(chunk.shape)
            given = {role: tensors[other][0].reshape(-1)[chunk.start : chunk.stop] for role, other in named.items()}
            parts = codec.encode(piece, "reference", given).parts
            row: dict[str, Any] = {"shape": list(chunk.shape)}
            if storage == "packed":
                buffer, size = encode_record([p.contiguous() for p in parts.values()], Packing(), Pool())
                record = buffer[:size].tobytes()
                row |= {"nbytes": size, "checksum": xxhash.xxh3_64_hexdigest(record)}
                records += record
            else:
                row["checksums"] = [xxhash.xxh3_64_hexdigest(bytes_of(parts[part])) for part in specs]
                for part in specs:
                    data[part] += bytes_of(parts[part])
            rows.append(row)
        for part, spec in specs.items() if storage == "plain" else ():
            kind, dims = entry_type(spec)
            plain[f"{name}/{part}"] = (kind, list(dims), data[part])
        if storage == "packed":
            packed[name] = ("U8", [len(records)], records)
        found = {k: {"dtype": s.dtype.name, "shape": list(s.shape)} for k, s in specs.items()}
        value = {
            "name": name, "shard": 0, "codec": codec.config(), "dtype": dtypes.name_of(tensor.dtype),
            "shape": list(shape), "storage": storage, "parts": found, "chunks": rows, "attributes": {"role": "other"},
        }  # fmt: skip
        items.append({**value, "companions": dict(named)} if named else value)
    entries = dict(sorted(plain.items(), key=lambda entry: -ITEMSIZE[entry[1][0]])) | packed
    path.write_bytes(build(items, entries, {"note": "test"} if document is None else document, "1.1"))
    return path
