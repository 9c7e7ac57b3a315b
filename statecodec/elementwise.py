"""Torch's element-wise operations on the calling thread alone.

Torch divides what has 32,768 elements or more among threads of its own. Beside the threads that compress chunks they
wait for each other, on a busy machine ten times as long as the work takes. Shorter pieces are not divided, and stay in
the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_PIECE: Final = (1 << 15) - 64


def pieces(x: Tensor) -> Iterator[slice]:
    """Divide the elements of a tensor: on a CPU into pieces that one thread works on.

    Args:
        x: The tensor.

    Yields:
        Where each piece is in the flat tensor.
    """
    size = _PIECE if x.device.type == "cpu" else max(x.numel(), 1)
    for start in range(0, x.numel(), size):
        yield slice(start, min(start + size, x.numel()))


def root(x: Tensor) -> Tensor:
    """Take the square root: on a CPU by numpy, because torch divides even 2,048 elements.

    Args:
        x: Of fp32 or fp64.

    Returns:
        The root of every element.
    """
    return x.sqrt() if x.device.type != "cpu" else torch.from_numpy(np.sqrt(x.numpy()))


def as_fp32(x: Tensor) -> Tensor:
    """Convert to fp32.

    Args:
        x: Of any float dtype, contiguous.

    Returns:
        The same values: `x` itself if they are fp32 already.
    """
    if x.dtype == torch.float32:
        return x
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    source, target = x.detach().view(-1), out.view(-1)
    for piece in pieces(x):
        target[piece].copy_(source[piece])
    return out
