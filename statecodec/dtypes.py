"""Names of dtypes: torch's own, in rules, in safetensors headers, and of the storage classes in torch files."""

from __future__ import annotations

from typing import Final

import torch

TORCH: Final[dict[str, torch.dtype]] = {
    name: value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype)
}
"""Global name in module `torch` -> dtype."""

SHORT: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
"""As people write them in rules."""

STORED: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    )
}  # fmt: skip
"""What an item or a part of our own files may be of, by its name there: torch's."""

NUMBERS: Final = frozenset(STORED.values())
"""What a region may be of. Everything else (complex32, float4_e2m1fn_x2, bits8 ...) is carried as bytes."""

SUB_BYTE: Final = frozenset({torch.quint4x2, torch.quint2x4})
"""Quantised dtypes whose shapes count more elements than there are bytes; only their storages are described."""

SAFETENSORS: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""safetensors name -> dtype, of those whose elements fill whole bytes."""

SAFETENSORS_SUB_BYTE_BITS: Final[dict[str, int]] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""safetensors dtypes that pack several elements into a byte; carried as bytes."""

_STORAGES: Final[dict[str, torch.dtype]] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    # Quantised storages hold plain integers; the scale stands elsewhere in the pickle.
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
_UNTYPED: Final = frozenset({"UntypedStorage", "_UntypedStorage"})
_STORAGE_MODULES: Final = frozenset({"torch", "torch.storage", "torch.cuda"})


def name_of(dtype: torch.dtype) -> str:
    """torch's name of a dtype: `float32`."""
    return str(dtype).removeprefix("torch.")


def storage_dtype(module: str, name: str) -> tuple[torch.dtype | None, bool] | None:
    """(dtype, untyped) of a storage class by its global name; None if it is not one.

    The dtype is None where a storage class is one that this version of torch does not have.
    """
    if module not in _STORAGE_MODULES:
        return None
    if name in _UNTYPED:
        return torch.uint8, True
    return (_STORAGES.get(name), False) if name.endswith("Storage") else None
