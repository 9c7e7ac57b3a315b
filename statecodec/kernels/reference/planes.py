"""Byte planes: plane k holds byte k (0 = least significant) of every element.

Floating-point elements are rotated left by one bit first, so that the sign goes to the low end and the exponent of fp32
and bf16 fills the top byte alone: that plane packs well, the others are noise. Complex elements count as two floats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from statecodec.dtypes import INT8, INT16, INT32, INT64, DType

if TYPE_CHECKING:
    from statecodec.lazy import torch

SIGNED = {1: INT8, 2: INT16, 4: INT32, 8: INT64}


def plane_layout(dtype: DType | torch.dtype) -> tuple[int, bool]:
    """(number of planes, whether elements are rotated left by one bit) for a dtype."""
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    return width, width > 1 and (dtype.is_floating_point or dtype.is_complex)
