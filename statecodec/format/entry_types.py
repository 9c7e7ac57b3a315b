"""The dtype name and shape of a plain part in a safetensors header."""

from __future__ import annotations

from statecodec import dtypes
from statecodec.codecs import PartSpec

# A writer uses only the names that every safetensors reader knows.
_FNUZ = ("F8_E5M2FNUZ", "F8_E4M3FNUZ")
NAMES = {dtype: name for name, dtype in dtypes.SAFETENSORS.items() if name not in _FNUZ}
ITEMSIZE = {name: dtype.itemsize for dtype, name in NAMES.items()}


def entry_type(spec: PartSpec) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of a plain part in the header: U8 with one more dimension where safetensors has no such dtype."""
    if spec.dtype in NAMES:
        return NAMES[spec.dtype], spec.shape
    return "U8", (*spec.shape, spec.dtype.itemsize)


def dtype_name(dtype: dtypes.DType) -> str:
    """The manifest's name of a dtype, such as `float32`; KeyError if the format has none."""
    if dtype not in dtypes.NUMBERS:
        raise KeyError(dtype)
    return dtype.name
