"""The step arithmetic of every elementwise method, once, in plain torch operations on decoded values.

All tensors are fp32 (or all fp64), updated in place, and of one shape unless stated; `g` is read only. Scalars are
computed on the host in float64. `decay` is the factor that decoupled weight decay multiplies the weight with (1 for
none). Bias corrections: c1 = 1 - beta1**t, c2 = 1 - beta2**t with t counting from 1.

Fused kernels implement these very lines (see `kernels.fused`), `cpu.steps` compiles them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

DITHER_1, DITHER_2, GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9


def adam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, *,
    lr: float, beta1: float, beta2: float, eps: float, c1: float, c2: float, decay: float,
) -> None:  # fmt: skip
    """Adam with decoupled decay, as torch.optim.AdamW orders its operations.

    Args:
        w: Weight, updated in place.
        g: Gradient.
        m: First moment, updated in place.
        v: Second moment, updated in place.
        lr: Learning rate.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: What is added to the corrected root.
        c1: 1 - beta1**t.
        c2: 1 - beta2**t.
        decay: Factor of the weight.

    Source:
        Loshchilov and Hutter (arXiv 1711.05101), algorithm 2.
    """
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    w.mul_(decay)
    w.addcdiv_(m, v.sqrt().div_(c2**0.5).add_(eps), value=-lr / c1)


def shared_adam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, *,
    lr: float, beta1: float, eps: float, c1: float, c2: float, decay: float,
) -> None:  # fmt: skip
    """Adam whose second moment broadcasts over the weight and has been updated already.

    The update of v, once per tensor: v = beta2 * v + (1 - beta2) * mean(g * g) over the shared dimensions.

    Args:
        w: Weight, updated in place.
        g: Gradient.
        m: First moment, updated in place.
        v: Second moment, with shared dimensions of size 1.
        lr: Learning rate.
        beta1: Decay rate of the first moment.
        eps: What is added to the corrected root.
        c1: 1 - beta1**t.
        c2: 1 - beta2**t.
        decay: Factor of the weight.

    Source:
        SlimAdam (arXiv 2503.01843), section 2.
    """
    m.lerp_(g, 1 - beta1)
    w.mul_(decay)
    w.addcdiv_(m, v.sqrt().div_(c2**0.5).add_(eps), value=-lr / c1)


def sgd(
    w: Tensor, g: Tensor, m: Tensor | None = None, *,
    lr: float, momentum: float, dampening: float, nesterov: bool, first: bool, decay: float,
) -> None:  # fmt: skip
    """SGD with momentum as torch.optim.SGD: the first gradient enters the buffer undampened.

    Args:
        w: Weight, updated in place.
        g: Gradient.
        m: Momentum buffer, updated in place; None without momentum.
        lr: Learning rate.
        momentum: How much of the buffer stays.
        dampening: How much of the gradient does not enter the buffer.
        nesterov: Use Nesterov's momentum.
        first: Whether this is the first step.
        decay: Factor of the weight.
    """
    w.mul_(decay)
    if m is None:
        w.add_(g, alpha=-lr)
        return
    m.mul_(momentum).add_(g, alpha=1.0 if first else 1 - dampening)
    w.add_(g.add(m, alpha=momentum) if nesterov else m, alpha=-lr)


def lion(w: Tensor, g: Tensor, m: Tensor, *, lr: float, beta1: float, beta2: float, decay: float) -> None:
    """The sign of the interpolated momentum; sign(0) = 0.

    Args:
        w: Weight, updated in place.
        g: Gradient.
        m: Momentum, updated in place.
        lr: Learning rate.
        beta1: How much of the momentum the interpolation has.
        beta2: How much of the momentum stays.
        decay: Factor of the weight.

    Source:
        Chen et al. 2023 (arXiv 2302.06675), algorithm 2.
    """
    w.mul_(decay)
    w.add_(torch.lerp(g, m, beta1).sign_(), alpha=-lr)
    m.lerp_(g, 1 - beta2)


def foam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, *,
    block: int, lr: float, beta1: float, beta2: float, eps: float, c1: float, c2: float, decay: float,
    scale: float, residual: float, mean_of_squares: bool, true_tail: bool, torch_bias: bool, decay_first: bool,
) -> None:  # fmt: skip
    """Adam on block means plus the residual of the current gradient.

    Args:
        w: Weight: rows x cols, updated in place.
        g: Gradient: rows x cols.
        m: First moment: rows x ceil(cols / block), updated in place.
        v: Second moment, of that shape, updated in place.
        block: Elements of a block.
        lr: Learning rate; the step is lr times `scale`.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: What is added to the root.
        c1: 1 - beta1**t.
        c2: 1 - beta2**t.
        decay: Factor of the weight.
        scale: Factor of the step.
        residual: Factor of the difference from the block's mean.
        mean_of_squares: v averages the mean of the squares; otherwise the square of the mean.
        true_tail: A short block divides by its own length; otherwise by `block`.
        torch_bias: eps is added to the corrected root; otherwise to the uncorrected one, as published.
        decay_first: Decay before the step; otherwise after it, as published.

    Source:
        FOAM (arXiv 2512.07112), algorithm 1, and its published code.
    """
    mean = _block_mean(g, block, true_tail)
    square = _block_mean(g * g, block, true_tail) if mean_of_squares else mean * mean
    m.lerp_(mean, 1 - beta1)
    v.mul_(beta2).add_(square, alpha=1 - beta2)
    cols = g.shape[-1]
    rest = (g - mean.repeat_interleave(block, -1)[:, :cols]).mul_(residual)
    direction = m.repeat_interleave(block, -1)[:, :cols] + rest
    root = rest.square_().add_(v.repeat_interleave(block, -1)[:, :cols]).sqrt_()
    if decay_first:
        w.mul_(decay)
    if torch_bias:
        w.addcdiv_(direction, root.div_(c2**0.5).add_(eps), value=-lr * scale / c1)
    else:
        w.addcdiv_(direction, root.add_(eps), value=-lr * scale * c2**0.5 / c1)
    if not decay_first:
        w.mul_(decay)


def _block_mean(x: Tensor, block: int, true_tail: bool) -> Tensor:
    """Sums over blocks, as a binary tree of neighbours so that every backend rounds alike, over their lengths."""
    rows, cols = x.shape
    blocks = -(-cols // block)
    total = torch.nn.functional.pad(x, (0, blocks * block - cols)).view(rows, blocks, block)
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    mean = total[..., 0] / block
    if true_tail and cols % block:
        mean[:, -1] = total[:, -1, 0] / (cols % block)
    return mean


def dither(w: Tensor, *, drop: int, seed: int, index: int, step: int, start: int) -> None:
    """Stochastic rounding of weights to a grid that lacks the low bits, in place.

    A uniform integer in [0, 2**drop) is added to the magnitude's bits, then the low bits are cleared: the expected
    value is the input. Values that would leave the finite range, infinities and NaN stay.

    Args:
        w: fp32, flat, contiguous.
        drop: Number of low bits that the grid lacks.
        seed: Seed of the random numbers.
        index: Position of the parameter among all.
        step: The step.
        start: Position of the first element of `w` in its parameter.
    """
    key = mix(mix(seed + index * GOLDEN) + step) + start
    dither_rows(w.view(1, -1), drop=drop, keys=torch.full((1,), key, dtype=torch.int64, device=w.device))


def dither_rows(w: Tensor, *, drop: int, keys: Tensor) -> None:
    """Dither several parameters at once, as `dither` does.

    Args:
        w: fp32, one parameter per row, updated in place.
        drop: Number of low bits that the grid lacks.
        keys: int64, one per row, on the device of `w`.
    """
    mask = (1 << drop) - 1
    element = torch.arange(w.shape[1], device=w.device)
    random = mix_tensor((element + keys[:, None]) & 0xFFFFFFFF) & mask
    bits = w.view(torch.int32)
    wide = bits.to(torch.int64)
    magnitude = wide & 0x7FFFFFFF
    rounded = (magnitude + random) & ~mask
    rounded = torch.where(rounded >= 0x7F800000, magnitude, rounded)
    bits.copy_((rounded | (wide & ~0x7FFFFFFF)).to(torch.int32))


def mix(x: int) -> int:
    """A 32-bit integer hash.

    Args:
        x: Its low 32 bits are hashed.

    Returns:
        32 bits.

    Source:
        lowbias32 (public domain) by C. Wellons.
    """
    x &= 0xFFFFFFFF
    x = ((x ^ x >> 16) * DITHER_1) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * DITHER_2) & 0xFFFFFFFF
    return x ^ x >> 16


def mix_tensor(x: Tensor) -> Tensor:
    """Hash a tensor as `mix` hashes integers.

    Args:
        x: int64, values below 2**32.

    Returns:
        int64, values below 2**32.
    """
    x = ((x ^ (x >> 16)) * DITHER_1) & 0xFFFFFFFF
    # The second constant exceeds 2**31: the int64 product may wrap, which leaves its low 32 bits intact.
    x = ((x ^ (x >> 15)) * DITHER_2) & 0xFFFFFFFF
    return x ^ (x >> 16)
