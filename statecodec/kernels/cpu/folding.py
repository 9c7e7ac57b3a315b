"""Block means for CPUs; the same binary tree of additions as `reference.folding`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from statecodec.kernels import INF, NAN
from statecodec.kernels.cpu.views import array_of, kernel


def fold_mean(x: Tensor, out: Tensor, *, block: int) -> int:
    """See `reference.folding.fold_mean`."""
    return int(_fold(array_of(x), array_of(out), block, np.zeros(block, np.float32)))


def unfold(mean: Tensor, out: Tensor, *, block: int) -> None:
    """See `reference.folding.unfold`."""
    _unfold(array_of(mean), array_of(out), block)


@kernel
def _fold(x: NDArray[Any], out: NDArray[Any], block: int, tree: NDArray[Any]) -> int:
    rows, cols = x.shape
    flags = 0
    for row in range(rows):
        for b in range(out.shape[1]):
            count = min(block, cols - b * block)
            tree[:count] = x[row, b * block : b * block + count]
            tree[count:] = np.float32(0.0)
            width = block
            while width > 1:
                width //= 2
                for i in range(width):
                    tree[i] = tree[2 * i] + tree[2 * i + 1]
            if np.isnan(tree[0]):
                flags |= NAN
            elif np.isinf(tree[0]):
                flags |= INF
            out[row, b] = tree[0] / np.float32(count)
    return flags


@kernel
def _unfold(mean: NDArray[Any], out: NDArray[Any], block: int) -> None:
    rows, cols = out.shape
    for row in range(rows):
        for b in range(mean.shape[1]):
            out[row, b * block : min((b + 1) * block, cols)] = mean[row, b]
