"""Descriptions of dtypes, so that reading a header needs no torch.

A `DType` describes torch's dtype of that name; `of` and `DType.torch` convert between the two. The names that dtypes
have in rules, in safetensors headers, and as storage classes in torch files are here, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, TypeAlias

from statecodec.lazy import torch

TorchDType: TypeAlias = "torch.dtype"


@dataclass(frozen=True, slots=True, repr=False)
class DType:
    """torch's dtype of that name, described. There is one object per name: `is` compares them."""

    name: str
    itemsize: int
    """Bytes of an element."""
    kind: Literal["float", "complex", ""] = ""

    @property
    def is_floating_point(self) -> bool:
        """Whether it is a real floating-point dtype."""
        return self.kind == "float"

    @property
    def is_complex(self) -> bool:
        """Whether it is a complex dtype."""
        return self.kind == "complex"

    @property
    def torch(self) -> TorchDType:
        """torch's own dtype object."""
        return _of_torch(self.name)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name


FLOAT32: Final = DType("float32", 4, "float")
FLOAT64: Final = DType("float64", 8, "float")
FLOAT16: Final = DType("float16", 2, "float")
BFLOAT16: Final = DType("bfloat16", 2, "float")
INT8: Final = DType("int8", 1)
INT16: Final = DType("int16", 2)
INT32: Final = DType("int32", 4)
INT64: Final = DType("int64", 8)
UINT8: Final = DType("uint8", 1)
UINT16: Final = DType("uint16", 2)
UINT32: Final = DType("uint32", 4)
UINT64: Final = DType("uint64", 8)
BOOL: Final = DType("bool", 1)
COMPLEX64: Final = DType("complex64", 8, "complex")
COMPLEX128: Final = DType("complex128", 16, "complex")
FLOAT8_E4M3FN: Final = DType("float8_e4m3fn", 1, "float")
FLOAT8_E5M2: Final = DType("float8_e5m2", 1, "float")
FLOAT8_E4M3FNUZ: Final = DType("float8_e4m3fnuz", 1, "float")
FLOAT8_E5M2FNUZ: Final = DType("float8_e5m2fnuz", 1, "float")
FLOAT8_E8M0FNU: Final = DType("float8_e8m0fnu", 1, "float")
QUINT4X2: Final = DType("quint4x2", 1)
QUINT2X4: Final = DType("quint2x4", 1)

STORED: Final = {
    dtype.name: dtype
    for dtype in (
        FLOAT32, FLOAT64, FLOAT16, BFLOAT16, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64, BOOL, COMPLEX64,
        COMPLEX128, FLOAT8_E4M3FN, FLOAT8_E5M2, FLOAT8_E4M3FNUZ, FLOAT8_E5M2FNUZ, FLOAT8_E8M0FNU,
    )
}  # fmt: skip
"""What an item or a part of our own files may be of, by its name there: torch's."""

_CARRIED: Final = (
    DType("complex32", 4, "complex"), DType("float4_e2m1fn_x2", 1, "float"), QUINT4X2, QUINT2X4,
    DType("quint8", 1), DType("qint8", 1), DType("qint32", 4), DType("bits16", 2),
    *(DType(name, 1) for name in ("bits8", "bits1x8", "bits2x4", "bits4x2")),
    *(DType(f"{sign}int{bits}", 1) for sign in ("", "u") for bits in range(1, 8)),
)  # fmt: skip
"""Dtypes of torch's whose tensors are carried as bytes."""
_ALIASES: Final = {
    "float": FLOAT32, "double": FLOAT64, "half": FLOAT16, "short": INT16, "int": INT32, "long": INT64,
    "cfloat": COMPLEX64, "cdouble": COMPLEX128,
}  # fmt: skip

TORCH: Final[dict[str, DType]] = {**STORED, **{dtype.name: dtype for dtype in _CARRIED}, **_ALIASES}
TORCH.update(chalf=TORCH["complex32"], bit=TORCH["uint1"])
"""Global name in module `torch` -> dtype."""

SHORT: Final = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16, "fp64": FLOAT64}
"""As people write them in rules."""

NUMBERS: Final = frozenset(STORED.values())
"""What a region may be of. Everything else (complex32, float4_e2m1fn_x2, bits8 ...) is carried as bytes."""

SUB_BYTE: Final = frozenset({QUINT4X2, QUINT2X4})
"""Quantised dtypes whose shapes count more elements than there are bytes; only their storages are described."""

SAFETENSORS: Final[dict[str, DType]] = {
    "BOOL": BOOL,
    "U8": UINT8,
    "I8": INT8,
    "F8_E5M2": FLOAT8_E5M2,
    "F8_E4M3": FLOAT8_E4M3FN,
    "F8_E5M2FNUZ": FLOAT8_E5M2FNUZ,
    "F8_E4M3FNUZ": FLOAT8_E4M3FNUZ,
    "F8_E8M0": FLOAT8_E8M0FNU,
    "I16": INT16,
    "U16": UINT16,
    "F16": FLOAT16,
    "BF16": BFLOAT16,
    "I32": INT32,
    "U32": UINT32,
    "F32": FLOAT32,
    "C64": COMPLEX64,
    "F64": FLOAT64,
    "I64": INT64,
    "U64": UINT64,
}
"""safetensors name -> dtype, of those whose elements fill whole bytes."""

SAFETENSORS_SUB_BYTE_BITS: Final[dict[str, int]] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""safetensors dtypes that pack several elements into a byte; carried as bytes."""

_STORAGES: Final[dict[str, DType]] = {
    "DoubleStorage": FLOAT64,
    "FloatStorage": FLOAT32,
    "HalfStorage": FLOAT16,
    "BFloat16Storage": BFLOAT16,
    "LongStorage": INT64,
    "IntStorage": INT32,
    "ShortStorage": INT16,
    "CharStorage": INT8,
    "ByteStorage": UINT8,
    "BoolStorage": BOOL,
    "ComplexDoubleStorage": COMPLEX128,
    "ComplexFloatStorage": COMPLEX64,
    # Quantised storages hold plain integers; the pickle has the scale elsewhere.
    "QInt8Storage": INT8,
    "QUInt8Storage": UINT8,
    "QInt32Storage": INT32,
    "QUInt4x2Storage": QUINT4X2,
    "QUInt2x4Storage": QUINT2X4,
}
_UNTYPED: Final = frozenset({"UntypedStorage", "_UntypedStorage"})
_STORAGE_MODULES: Final = frozenset({"torch", "torch.storage", "torch.cuda"})


@cache
def _of_torch(name: str) -> TorchDType:
    dtype: TorchDType = getattr(torch, name)
    return dtype


def name_of(dtype: DType | torch.dtype) -> str:
    """torch's name of a dtype: `float32`."""
    return str(dtype).removeprefix("torch.")


@cache
def of(dtype: torch.dtype) -> DType:
    """The description of torch's dtype. Raises KeyError for one that is not known here."""
    return TORCH[name_of(dtype)]


def storage_dtype(module: str, name: str) -> tuple[DType | None, bool] | None:
    """(dtype, untyped) of a storage class by its global name; None if it is not one.

    The dtype is None where a storage class is one that is not known here.
    """
    if module not in _STORAGE_MODULES:
        return None
    if name in _UNTYPED:
        return UINT8, True
    return (_STORAGES.get(name), False) if name.endswith("Storage") else None
