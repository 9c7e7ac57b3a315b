"""Byte planes: plane k holds byte k (0 = least significant) of every element.

Floating-point elements are rotated left by one bit first, so that the sign goes to the low end and the exponent of fp32
and bf16 fills the top byte alone: that plane packs well, the others are noise. Complex elements count as two floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from statecodec.dtypes import INT8, INT16, INT32, INT64, DType
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SIGNED = {1: INT8, 2: INT16, 4: INT32, 8: INT64}


def plane_layout(dtype: DType | torch.dtype) -> tuple[int, bool]:
    """(number of planes, whether elements are rotated left by one bit) for a dtype."""
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    return width, width > 1 and (dtype.is_floating_point or dtype.is_complex)


def split_planes(x: Tensor, planes: Tensor) -> None:
    """Split a tensor into byte planes.

    Args:
        x: Contiguous, of any shape and dtype.
        planes: Written: uint8, width x n, with contiguous rows.
    """
    width, rotate = plane_layout(x.dtype)
    bits = x.reshape(-1).view(SIGNED[width].torch)
    if rotate:
        bits = (bits << 1) | ((bits >> (8 * width - 1)) & 1)
    for k in range(width):
        planes[k] = ((bits >> (8 * k)) & 0xFF).to(torch.uint8) if width > 1 else bits.view(torch.uint8)


def merge_planes(planes: Sequence[Tensor], out: Tensor) -> None:
    """The inverse of `split_planes`.

    Args:
        planes: `width` planes: uint8, n each.
        out: Written: contiguous, n elements.
    """
    width, rotate = plane_layout(out.dtype)
    target = out.view(-1).view(SIGNED[width].torch)
    if width == 1:
        target.copy_(planes[0].view(torch.int8))
        return
    bits = torch.zeros_like(target)
    for k in range(width):
        bits |= planes[k].to(target.dtype) << (8 * k)
    if rotate:
        mask = (1 << (8 * width - 1)) - 1
        bits = ((bits >> 1) & mask) | (bits << (8 * width - 1))
    target.copy_(bits)


def constant_byte(x: Tensor) -> int:
    """The byte that fills a plane.

    Args:
        x: uint8, not empty.

    Returns:
        The value of every byte if they are all the same, else -1.
    """
    first = int(x[0])
    return first if bool((x == first).all()) else -1
