"""Names of dtypes: in the manifest (torch's own), and in a safetensors header."""

from __future__ import annotations

import torch

from statecodec.codecs import PartSpec

MANIFEST = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    )
}  # fmt: skip
SAFETENSORS = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
ITEMSIZE = {name: dtype.itemsize for dtype, name in SAFETENSORS.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a dtype, such as `float32`; KeyError if the format has none."""
    name = str(dtype).removeprefix("torch.")
    if name not in MANIFEST:
        raise KeyError(dtype)
    return name


def entry_type(spec: PartSpec) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of a plain part in the header: U8 with one more dimension where safetensors has no such dtype."""
    if spec.dtype in SAFETENSORS:
        return SAFETENSORS[spec.dtype], spec.shape
    return "U8", (*spec.shape, spec.dtype.itemsize)
