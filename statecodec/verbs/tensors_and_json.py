"""Values as two files: a safetensors file of all tensors, and a JSON file of everything else.

In the JSON every tensor is written as {"tensor": NAME}, where NAME is its key path and its name in the safetensors
file; a tensor with several key paths is stored once. Other values that JSON does not have are written as {"base64":
...}, {"number": "nan"} and the like.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from statecodec import dtypes
from statecodec.buffers import memory
from statecodec.checkpoint.left_out import MAX_DEPTH, joined
from statecodec.errors import OutputExists, UsageError
from statecodec.layouts.safetensors_file import MAX_HEADER_BYTES
from statecodec.lazy import torch
from statecodec.staging import StagedFile, Staging

if TYPE_CHECKING:
    from torch import Tensor

Used: TypeAlias = Callable[[int], None]
"""Told how many bytes of tensors were written."""

_MOST = 1_000_000  # values; shared ones are counted and written at each place
_PIECE = 16 << 20
_CODES = {dtype: code for code, dtype in dtypes.SAFETENSORS.items()}


@dataclass
class TensorsAndValues:
    """A value divided into its tensors and the rest."""

    tree: Any = None
    """What the JSON file holds."""
    tensors: dict[str, Tensor] = field(default_factory=dict)


class _TakingApart:
    def __init__(self) -> None:
        self.parts = TensorsAndValues()
        self.left_out: list[str] = []
        self._names: dict[Any, str] = {}
        """Memory, dtype, shape and stride of the tensors so far -> their names."""
        self._count = 0

    def plain(self, value: Any, path: str, depth: int) -> Any:
        """A value as JSON has it, its tensors taken out."""
        self._count += 1
        if depth > MAX_DEPTH or self._count > _MOST:
            raise UsageError(f"{path:.80}: nested more than {MAX_DEPTH} deep, or more than {_MOST:,} values")
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, dict):
            return self._dict(value, path, depth)
        if isinstance(value, (list, tuple)):
            return [self.plain(inner, joined(path, i), depth + 1) for i, inner in enumerate(value)]
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"number": str(value)}
        if type(value) is bytes:
            return {"base64": base64.b64encode(value).decode("ascii")}
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(np.asarray(value), path)
        if isinstance(value, (complex, range, slice, torch.dtype, torch.device)):
            return {type(value).__name__: str(value)}
        if type(value) in (set, frozenset):
            return {"set": [self.plain(inner, joined(path, i), depth + 1) for i, inner in enumerate(value)]}
        self.left_out.append(f"{path}: a value of type {type(value).__name__}")
        return None

    def _array(self, value: np.ndarray[Any, Any], path: str) -> Any:
        try:
            return self._tensor(torch.from_numpy(np.array(value)), path)
        except TypeError:  # a dtype that torch does not have
            self.left_out.append(f"{path}: a numpy array of {value.dtype}")
            return None

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> dict[str, Any]:
        described: dict[str, Any] = {}
        for key, inner in value.items():
            if str(key) in described:
                raise UsageError(f"{joined(path, key):.80}: two keys of a dict are {str(key)!r:.40} in JSON")
            described[str(key)] = self.plain(inner, joined(path, key), depth + 1)
        return described

    def _tensor(self, value: Tensor, path: str) -> Any:
        has_code = dtypes.TORCH.get(dtypes.name_of(value.dtype)) in _CODES
        if value.layout != torch.strided or value.is_meta or not has_code:
            self.left_out.append(f"{path}: a {value.dtype} tensor that is {value.layout}, on {value.device}")
            return None
        value = value.detach().resolve_conj().resolve_neg()
        key = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else object()
        if key not in self._names:
            name = base = path or "tensor"
            while name in self.parts.tensors or name == "__metadata__":
                name = f"{base}~{len(self.parts.tensors)}"
            self._names[key] = name
            self.parts.tensors[name] = value
        return {"tensor": self._names[key]}


def taken_apart(value: Any) -> tuple[TensorsAndValues, list[str]]:
    """Tensors and all other values, and what a safetensors file cannot hold. Raises UsageError."""
    work = _TakingApart()
    work.parts.tree = work.plain(value, "", 0)
    return work.parts, work.left_out


def write_tensors_and_json(parts: TensorsAndValues, target: Path, used: Used, *, force: bool) -> None:
    """Write `target` and, beside it, NAME.json; both or neither. Raises OutputExists, OutputFailed."""
    other = target.with_name(target.name.removesuffix(".safetensors") + ".json")
    if other.exists() and not force:
        raise OutputExists(f"{other} exists; force (--force) replaces it")
    text = json.dumps({"format": "statecodec.values", "values": parts.tree}, indent=1, allow_nan=False).encode()
    staging = Staging(target)
    try:
        _write(StagedFile(staging, other.name), iter([text]))
        _write(StagedFile(staging, target.name), _safetensors(parts.tensors, used))
        staging.publish(other, target, force=force, instead_of=(other, target) if force else ())
    finally:
        staging.close()


def _write(file: StagedFile, pieces: Iterator[bytes | memoryview]) -> None:
    try:
        size = 0
        for piece in pieces:
            file.write_at(piece, size)
            size += len(piece)
        file.finish(size, None)
    finally:
        file.close()


def _safetensors(tensors: Mapping[str, Tensor], used: Used) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file; wide dtypes come first, so that every tensor is aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda pair: -pair[1].itemsize)
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        dtype = _CODES[dtypes.of(tensor.dtype)]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise UsageError(
            f"{len(tensors):,} tensors need a header of {len(header):,} bytes, more than safetensors allows"
        )
    yield len(header).to_bytes(8, "little")
    yield header
    for _, tensor in ordered:
        data = memory(tensor.contiguous())
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            yield piece
            used(len(piece))
