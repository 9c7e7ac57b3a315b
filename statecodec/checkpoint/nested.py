"""Nested Python values as JSON: every value is tagged by its type, tensors are references to views of stored items.

Encoded optimizer states (the plain form of `statecodec.codecs.plain`) go in as the parts they already are.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from statecodec import codecs, dtypes
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.codecs import EncodedTensor, Encoding
from statecodec.codecs.plain import from_plain, is_plain, to_plain
from statecodec.errors import FormatError, UsageError
from statecodec.format import ItemSpec
from statecodec.layouts.objects import window
from statecodec.lazy import torch
from statecodec.roles import STATE_ROLES

if TYPE_CHECKING:
    from torch import Tensor

MAX_DEPTH = 100
TREE = "tree"
"""The item that holds the JSON."""
_TAKEN = "save takes nested dicts, lists and tuples of tensors and plain values"


@dataclass
class CollectedItems:
    """What walking a value collects: items to store, and the tensors or encoded tensors behind them."""

    items: list[ItemSpec] = field(default_factory=list)
    tensors: list[Tensor | EncodedTensor] = field(default_factory=list)
    storages: dict[tuple[int, torch.device], int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=lambda: {TREE: 1})


def to_json(value: Any, collected: CollectedItems, path: str = "", depth: int = 0) -> Any:
    """A value as JSON, its tensors collected. Raises UsageError, with the key path, for what cannot be saved."""
    if depth > MAX_DEPTH:
        raise UsageError(f"{path[:80]}...: nested more than {MAX_DEPTH} deep")
    if isinstance(value, EncodedTensor) or is_plain(value):
        encoded = value if isinstance(value, EncodedTensor) else from_plain(value)
        return {"encoded": _add_encoded(encoded, path, collected)}
    if isinstance(value, torch.Tensor):
        return _add_tensor(value, path, collected)
    if type(value) in (dict, OrderedDict):
        pairs = [
            [to_json(k, collected, f"{path} key", depth + 1), to_json(v, collected, _join(path, k), depth + 1)]
            for k, v in value.items()
        ]
        return {"odict" if type(value) is OrderedDict else "dict": pairs}
    if type(value) is torch.Size:
        return {"size": list(value)}
    if type(value) in (list, tuple):
        kind = "list" if type(value) is list else "tuple"
        return {kind: [to_json(v, collected, _join(path, i), depth + 1) for i, v in enumerate(value)]}
    return _scalar(value, path)


def _scalar(value: Any, path: str) -> Any:
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return value if abs(value) < 1 << 53 else {"int": str(value)}
    if type(value) is float:
        return {"float": value.hex()}
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if type(value) is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, torch.dtype):
        return {"dtype": dtypes.name_of(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    kinds = [k.__name__ for k in (dict, list, tuple, float, int, str, bytes) if isinstance(value, k)]
    hint = f"; {kinds[0]}(...) of it can be saved" if kinds else ""
    raise UsageError(f"{path or 'the value'} is a {_kind(value)}: {_TAKEN}{hint}")


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _add_encoded(encoded: EncodedTensor, path: str, collected: CollectedItems) -> int:
    _check_tensors(encoded.parts.values(), path)
    collected.items.append(
        ItemSpec(
            _name(path, collected),
            Encoding(encoded.codec),
            encoded.shape,
            dtypes.of(encoded.dtype),
            attributes=_attributes(path),
        )
    )
    collected.tensors.append(encoded)
    return len(collected.items) - 1


def _add_tensor(tensor: Tensor, path: str, collected: CollectedItems) -> Any:
    """One item per tensor, or per storage where several tensors look at one."""
    _check_tensors([tensor], path)
    plain = tensor.detach()
    storage = plain.untyped_storage()
    key = (storage.data_ptr() if storage.nbytes() else id(tensor), plain.device)
    nbytes = plain.numel() * plain.element_size()
    stored = dtypes.name_of(plain.dtype) in dtypes.STORED  # others are stored as bytes
    whole = stored and plain.is_contiguous() and plain.storage_offset() == 0 and storage.nbytes() == nbytes
    index = collected.storages.get(key)
    if index is None:
        base = plain if whole else torch.empty(0, dtype=torch.uint8, device=plain.device).set_(storage)
        index = collected.storages[key] = len(collected.items)
        raw, dtype, attributes = Encoding(codecs.Raw()), dtypes.of(base.dtype), _attributes(path)
        collected.items.append(ItemSpec(_name(path, collected), raw, tuple(base.shape), dtype, attributes))
        collected.tensors.append(base)
    shape, stride = list(plain.shape), list(plain.stride())
    return {"tensor": [index, dtypes.name_of(plain.dtype), shape, stride, plain.storage_offset()]}


def _check_tensors(tensors: Iterable[Tensor], path: str) -> None:
    """Raise UsageError for a tensor that has no plain memory of its own."""
    for tensor in tensors:
        reason = None
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            reason = f"a {_kind(tensor)}; save what it holds as plain tensors"
        elif tensor.is_nested:
            reason = "a nested tensor; save its parts (unbind) or its values and offsets"
        elif tensor.layout != torch.strided or tensor.is_quantized:
            reason = f"a tensor of layout {tensor.layout}{', quantized' if tensor.is_quantized else ''}; save its parts"
        elif tensor.is_conj() or tensor.is_neg():
            reason = "a lazily conjugated or negated tensor; resolve_conj() or resolve_neg() it first"
        elif tensor.device.type == "meta":
            reason = "a tensor on the device meta: it has a shape, but no numbers"
        elif _reach(tensor) > tensor.untyped_storage().nbytes():
            reason = "a tensor whose memory was freed (resized to less than its shape needs)"
        if reason:
            raise UsageError(f"{path or 'the value'} is {reason}")


def _reach(tensor: Tensor) -> int:
    """Bytes of a tensor's storage, from the first, up to the last that the tensor uses."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.element_size()


def from_json(
    value: Any, stored: StoredCheckpoint, storages: dict[int, Tensor], device: torch.device | str, depth: int = 0
) -> Any:
    """The inverse of `to_json`; nothing in the JSON is trusted. Raises FormatError."""
    if value is None or type(value) in (bool, str, int):
        return value
    if not isinstance(value, dict) or len(value) != 1 or depth > MAX_DEPTH + 2:
        raise FormatError(f"{stored.path}: the saved value's description is damaged")
    ((kind, content),) = value.items()

    def deeper(v: Any) -> Any:
        return from_json(v, stored, storages, device, depth + 1)

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


def _tensor(content: Any, stored: StoredCheckpoint, storages: dict[int, Tensor], device: torch.device | str) -> Tensor:
    index, dtype_name, shape, stride, offset = content
    item = stored.reader.items[_index(index, stored)]
    dtype = dtypes.TORCH.get(dtype_name)
    numbers = [offset, *shape, *stride]
    if dtype is None or len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise ValueError("a tensor's window")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > item.decoded_nbytes:
        raise ValueError(f"a tensor reaches outside of {item.name}")
    if index not in storages:
        if torch.device(device).type == "meta":  # its tensors have no numbers to read
            storages[index] = torch.empty(item.decoded_nbytes, dtype=torch.uint8, device="meta")
        else:
            storages[index] = stored.decode(index).reshape(-1).view(torch.uint8).to(device)
    return window(storages[index], dtype, tuple(shape), tuple(stride), offset)


def _index(value: Any, stored: StoredCheckpoint) -> int:
    if type(value) is not int or not 0 <= value < len(stored.reader.items):
        raise ValueError(f"no item {str(value)[:20]}")
    return value


def _dtype(name: str) -> torch.dtype:
    return dtypes.TORCH[name].torch


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": float.fromhex,
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "complex": lambda pair: complex(float.fromhex(pair[0]), float.fromhex(pair[1])),
    "dtype": _dtype,
    "device": lambda text: torch.device(text),
    "size": lambda sizes: torch.Size(sizes),
}


def _attributes(path: str) -> dict[str, Any]:
    keys = path.split(".")
    roles = {**STATE_ROLES, "step": "step"}
    role = next((roles[k] for k in reversed(keys) if k in roles), "other")
    if role == "other" and keys[0] in ("model", "state_dict", "module"):
        role = "weight"
    return {"role": role, "param": ".".join(keys[1:]) if role == "weight" else None}


def _name(path: str, collected: CollectedItems) -> str:
    base = path.replace("/", "|") or "value"
    base = f"tensor.{base}" if base.startswith("__") else base
    name = base
    while name in collected.names:
        collected.names[base] += 1
        name = f"{base}~{collected.names[base]}"
    collected.names[name] = 1
    return name


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
