"""Saving nested Python values straight into a compressed file (`save`), and getting them back.

The nesting is kept as JSON in the document: every value is tagged by its type, tensors are references to views of
items. Encoded optimizer states (the plain form of `statecodec.codecs.plain`) go in as the parts they already are.
"""

from __future__ import annotations

import base64
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statecodec import codecs
from statecodec._version import __version__
from statecodec.atomic import Output
from statecodec.checkpoint.chain import refuse_base
from statecodec.checkpoint.document import Document, to_json
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.stored import Stored, make_report
from statecodec.codecs import EncodedTensor
from statecodec.codecs.chunking import iterate
from statecodec.codecs.plain import from_plain, is_plain, to_plain
from statecodec.errors import FormatError, OutputExists, UsageError
from statecodec.format import Item, Packing, Writer
from statecodec.layouts.objects import window
from statecodec.roles import STATE_ROLES

_MAX_DEPTH = 100
_TREE = "tree"


@dataclass
class _Collected:
    """What walking the value finds: items to store, and the tensors or encoded tensors behind them."""

    items: list[Item] = field(default_factory=list)
    tensors: list[Tensor | EncodedTensor] = field(default_factory=list)
    storages: dict[tuple[int, torch.device], int] = field(default_factory=dict)
    names: set[str] = field(default_factory=lambda: {_TREE})


def save(obj: Any, path: str | Path, *, pack: str = "zstd", force: bool = False) -> Report:
    """Save nested dicts, lists and tuples of tensors and plain values as a compressed checkpoint, losslessly.

    Encoded tensors (EncodedTensor, or their plain form as in an optimizer's state_dict()) are stored as they are,
    nothing is decoded. Tensors sharing a storage share it again after `load`. Values may be None, bool, int, float,
    complex, str, bytes, torch.dtype, torch.Size, torch.device; anything else is refused by its key path.

    Raises UsageError, OutputExists, OSError.
    """
    target = Path(path)
    if target.exists() and not force:
        raise OutputExists(f"{target} exists; use force to replace it")
    refuse_base(target)
    found = _Collected()
    tree = _to_json(obj, "", found, 0)
    size = sum(_nbytes(t) for t in found.tensors)
    text = torch.frombuffer(bytearray(json.dumps(tree).encode()), dtype=torch.uint8)
    found.items.append(Item(_TREE, codecs.Raw(), tuple(text.shape), torch.uint8, {"role": "skeleton"}))
    found.tensors.append(text)
    source = {"name": _original_name(target), "layout": "native", "bytes": size, "sha256": None}
    document = Document(f"statecodec {__version__}", None, (), source, (), (), ())
    with Writer(target, found.items, packing=Packing.parse(pack), max_shard_size=None, force=force) as writer:
        for index, tensor in enumerate(found.tensors):
            for chunk, parts in _chunks(found.items[index], tensor):
                writer.append(writer.pack(index, chunk, parts))
        written = writer.close(to_json(document))
    return make_report(target, written.version, document, written.items, written.files)


def load_native(stored: Stored, device: torch.device | str = "cpu") -> Any:
    """The value that `save` was given; encoded tensors in their plain form."""
    try:
        item = stored.reader.index(_TREE)
        value = json.loads(stored.decode(item).numpy().tobytes())
        return _from_json(value, stored, {}, device, 0)
    except (UsageError, ValueError, RecursionError) as error:
        raise FormatError(f"{stored.path}: no description of the saved value can be read: {error}") from error


def restore_native(stored: Stored, output: Output) -> None:
    """Write the saved value as an ordinary torch.save file, with encoded tensors decoded."""
    with output.create() as file:
        torch.save(_decoded(load_native(stored)), file)


def _to_json(value: Any, path: str, found: _Collected, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise UsageError(f"{path[:80]}...: nested more than {_MAX_DEPTH} deep")
    if isinstance(value, EncodedTensor) or is_plain(value):
        return {"encoded": _add_encoded(value if isinstance(value, EncodedTensor) else from_plain(value), path, found)}
    if isinstance(value, Tensor):
        return _add_tensor(value, path, found)
    if isinstance(value, Mapping):
        kind = "odict" if isinstance(value, OrderedDict) else "dict"
        pairs = [
            [_to_json(k, f"{path} key", found, depth + 1), _to_json(v, _join(path, k), found, depth + 1)]
            for k, v in value.items()
        ]
        return {kind: pairs}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_to_json(v, _join(path, i), found, depth + 1) for i, v in enumerate(value)]}
    return _scalar_to_json(value, path)


def _scalar_to_json(value: Any, path: str) -> Any:
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return value if abs(value) < 1 << 53 else {"int": str(value)}
    if type(value) is float:
        return {"float": value.hex()}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if type(value) is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise UsageError(
        f"{path or 'the value'} is a {type(value).__module__}.{type(value).__qualname__}: save takes nested dicts, "
        "lists and tuples of tensors and plain values"
    )


def _add_encoded(encoded: EncodedTensor, path: str, found: _Collected) -> int:
    found.items.append(
        Item(
            name=_name(path, found),
            codec=encoded.codec,
            shape=encoded.shape,
            dtype=encoded.dtype,
            attributes=_attributes(path),
        )
    )
    found.tensors.append(encoded)
    return len(found.items) - 1


def _add_tensor(tensor: Tensor, path: str, found: _Collected) -> Any:
    """One item per tensor, or per storage where several tensors look at one."""
    plain = tensor.detach()
    if plain.layout != torch.strided or plain.is_quantized or plain.is_conj() or plain.is_neg():
        raise UsageError(
            f"{path or 'the value'}: save takes plain strided tensors, not {plain.layout} or lazily conjugated ones"
        )
    storage = plain.untyped_storage()
    key = (storage.data_ptr() if storage.nbytes() else id(tensor), plain.device)
    whole = (
        plain.is_contiguous()
        and plain.storage_offset() == 0
        and storage.nbytes() == plain.numel() * plain.element_size()
    )
    index = found.storages.get(key)
    if index is None:
        base = plain if whole else torch.empty(0, dtype=torch.uint8, device=plain.device).set_(storage)
        index = found.storages[key] = len(found.items)
        found.items.append(
            Item(
                name=_name(path, found),
                codec=codecs.Raw(),
                shape=tuple(base.shape),
                dtype=base.dtype,
                attributes=_attributes(path),
            )
        )
        found.tensors.append(base)
    return {
        "tensor": [
            index,
            str(plain.dtype).removeprefix("torch."),
            list(plain.shape),
            list(plain.stride()),
            plain.storage_offset(),
        ]
    }


def _chunks(item: Item, tensor: Tensor | EncodedTensor) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """Chunks of an item with their parts: slices of what is there, nothing is encoded."""
    encoded = (
        tensor
        if isinstance(tensor, EncodedTensor)
        else EncodedTensor(item.codec, item.shape, item.dtype, {"data": tensor})
    )
    flat = {name: part.reshape(-1) for name, part in encoded.parts.items()}
    position = dict.fromkeys(flat, 0)
    for chunk in iterate(item.codec, item.shape, item.dtype):
        parts = {}
        for name, spec in item.codec.parts(chunk.shape, item.dtype).items():
            parts[name] = flat[name][position[name] : position[name] + spec.numel].view(spec.shape).to("cpu")
            position[name] += spec.numel
        yield chunk, parts


def _from_json(value: Any, stored: Stored, storages: dict[int, Tensor], device: torch.device | str, depth: int) -> Any:
    if value is None or type(value) in (bool, str, int):
        return value
    if not isinstance(value, dict) or len(value) != 1 or depth > _MAX_DEPTH + 2:
        raise FormatError(f"{stored.path}: the saved value's description is damaged")
    ((kind, content),) = value.items()

    def deeper(v: Any) -> Any:
        return _from_json(v, stored, storages, device, depth + 1)

    try:
        if kind in ("dict", "odict"):
            pairs = ((deeper(k), deeper(v)) for k, v in content)
            return OrderedDict(pairs) if kind == "odict" else dict(pairs)
        if kind in ("list", "tuple"):
            return [deeper(v) for v in content] if kind == "list" else tuple(deeper(v) for v in content)
        if kind == "encoded":
            item = stored.reader.items[_index(content, stored)]
            return to_plain(stored.reader.read(item.name).to(device))
        if kind == "tensor":
            return _tensor(content, stored, storages, device)
        return _SCALARS[kind](content)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        raise FormatError(f"{stored.path}: the saved value's description is damaged: {error}") from error


def _tensor(content: Any, stored: Stored, storages: dict[int, Tensor], device: torch.device | str) -> Tensor:
    index, dtype_name, shape, stride, offset = content
    item = stored.reader.items[_index(index, stored)]
    dtype = getattr(torch, dtype_name)
    numbers = [offset, *shape, *stride]
    if (
        not isinstance(dtype, torch.dtype)
        or len(shape) != len(stride)
        or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
    ):
        raise ValueError("a tensor's window")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > item.decoded_nbytes:
        raise ValueError(f"a tensor reaches outside of {item.name}")
    if index not in storages:
        storages[index] = stored.decode(index).reshape(-1).view(torch.uint8).to(device)
    return window(storages[index], dtype, tuple(shape), tuple(stride), offset)


def _index(value: Any, stored: Stored) -> int:
    if type(value) is not int or not 0 <= value < len(stored.reader.items):
        raise ValueError(f"no item {str(value)[:20]}")
    return value


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name[:40]!r} is no dtype")
    return dtype


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": float.fromhex,
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "complex": lambda pair: complex(float.fromhex(pair[0]), float.fromhex(pair[1])),
    "dtype": _dtype,
    "device": torch.device,
    "size": torch.Size,
}


def _decoded(value: Any) -> Any:
    if is_plain(value):
        return from_plain(value).decode()
    if isinstance(value, dict):
        return type(value)((k, _decoded(v)) for k, v in value.items())
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_decoded(v) for v in value)
    return value


def _attributes(path: str) -> dict[str, Any]:
    keys = path.split(".")
    known = {**STATE_ROLES, "step": "step"}
    role = next((known[k] for k in reversed(keys) if k in known), "other")
    if role == "other" and keys[0] in ("model", "state_dict", "module"):
        role = "weight"
    return {"role": role, "param": ".".join(keys[1:]) if role == "weight" else None}


def _name(path: str, found: _Collected) -> str:
    base = path.replace("/", "|") or "value"
    base = f"tensor.{base}" if base.startswith("__") else base
    name, number = base, 2
    while name in found.names:
        name, number = f"{base}~{number}", number + 1
    found.names.add(name)
    return name


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _nbytes(tensor: Tensor | EncodedTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _original_name(target: Path) -> str:
    return target.name.removesuffix(".safetensors").removesuffix(".sc") + ".pt"
