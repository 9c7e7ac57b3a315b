"""How a tensor of rows x cols is cut into tiles of groups, for codec kernels and for the general fused step."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from statecodec.kernels.triton.runtime import TILE, power_of_two

WIDEST = 4096  # a group up to this size is held in registers


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The tile of a program, known when it is compiled: `count` groups of `group` elements, on `width` lanes each.

    `whole`: groups tile aligned memory, so rows do not matter and accesses are wide.
    """

    group: int = 0
    width: int = 0
    count: int = 0
    whole: bool = False


def tiled(group: int, *tensors: Tensor) -> tuple[Tile, int]:
    """The tile for groups of the first tensor, rows x cols, and how many programs that is; the others are its parts."""
    rows, cols = tensors[0].shape
    groups, width = rows * -(-cols // group), power_of_two(group)
    count = max(1, min(TILE // width, power_of_two(groups)))
    whole = cols % group == 0 and group == width and rows * cols % 16 == 0
    whole = whole and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return Tile(group=group, width=width, count=count, whole=whole), -(-groups // count)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from an address. ALIGNED promises 16 bytes, without which there are no wide accesses."""
    typed = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        typed = tl.multiple_of(typed, 16)
    return typed


@triton.jit
def load_float(address, offset, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """fp32 values of floating point numbers."""
    return tl.load(pointer(address, DTYPE, ALIGNED) + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def places(rows, cols, start, TILE: tl.constexpr):
    """Where the groups from `start` on lie in a rows x cols tensor.

    Returns `here`: their index, elements, which are inside, bytes of nibbles, which are inside, whether the group
    exists; and of each group its row, where in the row it begins, and its size.
    """
    WIDTH: tl.constexpr = TILE.width
    HALF: tl.constexpr = (TILE.width + 1) // 2
    index = start + tl.arange(0, TILE.count)
    lane, pair = tl.arange(0, WIDTH)[None, :], tl.arange(0, HALF)[None, :]
    if TILE.whole:  # whole groups follow each other through the rows: the tensor is one row to this code
        numel = tl.multiple_of(rows * cols, 16)
        row, first = index * 0, index * WIDTH
        size = tl.minimum(numel - first, WIDTH)
        offset = first[:, None] + lane
        inside = offset < numel
        packed = index[:, None] * HALF + pair
        packed_inside = packed < tl.multiple_of(rows * cols // 2, 8)
    else:
        groups = (cols + TILE.group - 1) // TILE.group
        row = index // groups
        first = (index - row * groups) * TILE.group
        size = tl.where(row < rows, tl.minimum(cols - first, TILE.group), 0)
        offset = (row * cols + first)[:, None] + lane
        inside = lane < size[:, None]
        packed = (row * ((cols + 1) // 2) + first // 2)[:, None] + pair
        packed_inside = 2 * pair < size[:, None]
    return (index, offset, inside, packed, packed_inside, size > 0), row, first, size
