"""The step arithmetic of `reference.steps`, compiled: one pass over a tile that is in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statecodec.kernels.cpu.views import array_of, bits_of, kernel
from statecodec.kernels.reference.steps import DITHER_1, DITHER_2, GOLDEN, mix

__all__ = ["adam", "dither", "foam", "lion", "sgd", "shared_adam"]


def adam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, *,
    lr: float, beta1: float, beta2: float, eps: float, c1: float, c2: float, decay: float,
) -> None:  # fmt: skip
    """See `reference.steps.adam`."""
    f = _float(w)
    _adam(
        flat(w), flat(g), flat(m), flat(v),
        f(1 - beta1), f(beta2), f(1 - beta2), f(eps), f(lr / c1), f(c2**0.5), f(decay),
    )  # fmt: skip


def shared_adam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, *,
    lr: float, beta1: float, eps: float, c1: float, c2: float, decay: float,
) -> None:  # fmt: skip
    """See `reference.steps.shared_adam`. Every operation is rounded once, as in `adam`; torch's roots need not be."""
    divisor = torch.empty_like(v)
    np.sqrt(v.numpy(), out=divisor.numpy())
    divisor.div_(c2**0.5).add_(eps)
    m.add_((g - m).mul_(1 - beta1))
    w.mul_(decay).sub_((m / divisor).mul_(lr / c1))


def sgd(
    w: Tensor, g: Tensor, m: Tensor | None = None, *,
    lr: float, momentum: float, dampening: float, nesterov: bool, first: bool, decay: float,
) -> None:  # fmt: skip
    """See `reference.steps.sgd`."""
    f = _float(w)
    if m is None:
        w.mul_(decay).add_(g, alpha=-lr)
        return
    gain = 1.0 if first else 1 - dampening
    ahead, fresh = (f(momentum), f(1)) if nesterov else (f(0), f(0))
    _sgd(flat(w), flat(g), flat(m), f(lr), f(momentum), f(gain), ahead, fresh, f(decay))


def lion(w: Tensor, g: Tensor, m: Tensor, *, lr: float, beta1: float, beta2: float, decay: float) -> None:
    """See `reference.steps.lion`."""
    f = _float(w)
    _lion(flat(w), flat(g), flat(m), f(lr), f(beta1), f(1 - beta2), f(decay))


def foam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, *,
    block: int, lr: float, beta1: float, beta2: float, eps: float, c1: float, c2: float, decay: float,
    scale: float, residual: float, mean_of_squares: bool, true_tail: bool, torch_bias: bool, decay_first: bool,
) -> None:  # fmt: skip
    """See `reference.steps.foam`."""
    root = c2**0.5
    step = lr * scale / c1 if torch_bias else lr * scale * root / c1
    f = np.float32
    _foam(
        array_of(w), array_of(g), array_of(m), array_of(v), block, f(1 - beta1), f(beta2), f(1 - beta2), f(eps),
        f(step), f(root if torch_bias else 1.0), f(decay if decay_first else 1.0), f(1.0 if decay_first else decay),
        f(residual), mean_of_squares, true_tail,
    )  # fmt: skip


def dither(w: Tensor, *, drop: int, seed: int, index: int, step: int, start: int) -> None:
    """See `reference.steps.dither`; the same bits."""
    key = mix(mix(seed + index * GOLDEN) + step)
    _dither(bits_of(w).reshape(-1), np.uint32((1 << drop) - 1), np.uint32((start + key) & 0xFFFFFFFF))


def flat(x: Tensor) -> NDArray[Any]:
    """A contiguous tensor's memory as a flat numpy array."""
    return array_of(x).reshape(-1)


def _float(w: Tensor) -> Any:
    return np.float64 if w.dtype == torch.float64 else np.float32


@kernel
def _adam(
    w: NDArray[Any], g: NDArray[Any], m: NDArray[Any], v: NDArray[Any],
    one_beta1: Any, beta2: Any, one_beta2: Any, eps: Any, step: Any, root: Any, decay: Any,
) -> None:  # fmt: skip
    for i in range(w.size):
        m[i] = m[i] + one_beta1 * (g[i] - m[i])
        v[i] = v[i] * beta2 + one_beta2 * g[i] * g[i]
        w[i] = w[i] * decay - step * (m[i] / (np.sqrt(v[i]) / root + eps))


@kernel
def _sgd(
    w: NDArray[Any], g: NDArray[Any], m: NDArray[Any],
    lr: Any, momentum: Any, gain: Any, ahead: Any, fresh: Any, decay: Any,
) -> None:  # fmt: skip
    if fresh == 0:
        for i in range(w.size):
            m[i] = m[i] * momentum + gain * g[i]
            w[i] = w[i] * decay - lr * m[i]
    else:
        for i in range(w.size):
            m[i] = m[i] * momentum + gain * g[i]
            w[i] = w[i] * decay - lr * (g[i] + ahead * m[i])


@kernel
def _lion(w: NDArray[Any], g: NDArray[Any], m: NDArray[Any], lr: Any, beta1: Any, one_beta2: Any, decay: Any) -> None:
    for i in range(w.size):
        w[i] = w[i] * decay - lr * np.sign(g[i] + beta1 * (m[i] - g[i]))
        m[i] = m[i] + one_beta2 * (g[i] - m[i])


@kernel
def _tree_sum(x: NDArray[Any]) -> Any:
    """The sum of 2**n numbers as a binary tree of neighbours; they are overwritten."""
    width = x.size
    while width > 1:
        width //= 2
        for i in range(width):
            x[i] = x[2 * i] + x[2 * i + 1]
    return x[0]


@kernel
def _foam(
    w: NDArray[Any], g: NDArray[Any], m: NDArray[Any], v: NDArray[Any], block: int,
    one_beta1: Any, beta2: Any, one_beta2: Any, eps: Any, step: Any, root: Any, decay: Any, decay_after: Any,
    residual: Any,
    mean_of_squares: bool, true_tail: bool,
) -> None:  # fmt: skip
    rows, cols = w.shape
    tree, squares = np.empty(block, w.dtype), np.empty(block, w.dtype)
    for row in range(rows):
        for b in range(m.shape[1]):
            begin, stop = b * block, min((b + 1) * block, cols)
            tree[stop - begin :], squares[stop - begin :] = 0, 0
            for i in range(begin, stop):
                tree[i - begin] = g[row, i]
                squares[i - begin] = g[row, i] * g[row, i]
            total = _tree_sum(tree)
            count = np.float32(stop - begin if true_tail else block)
            mean = total / count
            square = _tree_sum(squares) / count if mean_of_squares else mean * mean
            m[row, b] = m[row, b] + one_beta1 * (mean - m[row, b])
            v[row, b] = v[row, b] * beta2 + one_beta2 * square
            for i in range(begin, stop):
                rest = residual * (g[row, i] - mean)
                size = np.sqrt(rest * rest + v[row, b]) / root + eps
                w[row, i] = (w[row, i] * decay - step * ((m[row, b] + rest) / size)) * decay_after


@kernel
def _dither(bits: NDArray[Any], mask: Any, key: Any) -> None:
    x = np.uint32(key)
    for i in range(bits.size):
        # numba widens products of uint32 to uint64: cast back after each.
        random = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(DITHER_1))
        random = np.uint32((random ^ (random >> np.uint32(15))) * np.uint32(DITHER_2))
        random = (random ^ (random >> np.uint32(16))) & mask
        magnitude = np.uint32(bits[i]) & np.uint32(0x7FFFFFFF)
        rounded = (magnitude + random) & ~mask
        kept = magnitude if rounded >= np.uint32(0x7F800000) else rounded
        bits[i] = np.int32(kept | (np.uint32(bits[i]) & np.uint32(0x80000000)))
        x = np.uint32(x + np.uint32(1))
