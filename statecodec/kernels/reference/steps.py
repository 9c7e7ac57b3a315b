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
    """Adam with decoupled decay (Loshchilov and Hutter), as torch.optim.AdamW orders its operations."""
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    w.mul_(decay)
    w.addcdiv_(m, v.sqrt().div_(c2**0.5).add_(eps), value=-lr / c1)


def shared_adam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, *,
    lr: float, beta1: float, eps: float, c1: float, c2: float, decay: float,
) -> None:  # fmt: skip
    """SlimAdam (section 2): Adam whose second moment `v` broadcasts over `w` and has been updated already.

    The update of v, once per tensor: v = beta2 * v + (1 - beta2) * mean(g * g) over the shared dimensions.
    """
    m.lerp_(g, 1 - beta1)
    w.mul_(decay)
    w.addcdiv_(m, v.sqrt().div_(c2**0.5).add_(eps), value=-lr / c1)


def sgd(
    w: Tensor, g: Tensor, m: Tensor | None = None, *,
    lr: float, momentum: float, dampening: float, nesterov: bool, first: bool, decay: float,
) -> None:  # fmt: skip
    """SGD with momentum as torch.optim.SGD: the first gradient enters the buffer undampened.

    `m` is None without momentum.
    """
    w.mul_(decay)
    if m is None:
        w.add_(g, alpha=-lr)
        return
    m.mul_(momentum).add_(g, alpha=1.0 if first else 1 - dampening)
    w.add_(g.add(m, alpha=momentum) if nesterov else m, alpha=-lr)


def lion(w: Tensor, g: Tensor, m: Tensor, *, lr: float, beta1: float, beta2: float, decay: float) -> None:
    """Lion (Chen et al. 2023): the sign of the interpolated momentum; sign(0) = 0."""
    w.mul_(decay)
    w.add_(torch.lerp(g, m, beta1).sign_(), alpha=-lr)
    m.lerp_(g, 1 - beta2)


def foam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, *,
    block: int, lr: float, beta1: float, beta2: float, eps: float, c1: float, c2: float, decay: float,
    scale: float, residual: float, mean_of_squares: bool, true_tail: bool, torch_bias: bool, decay_first: bool,
) -> None:  # fmt: skip
    """FOAM (section 3): Adam on block means plus the residual of the current gradient.

    `w`, `g` are rows x cols, the moments rows x ceil(cols / block). `lr` times `scale` is the step; `decay` as above,
    before the step, or after it if `decay_first` is False; `torch_bias` False puts eps next to the uncorrected root, as
    published.
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
    """Stochastic rounding of fp32 `w` (flat, contiguous) to a grid that lacks the low `drop` bits, in place.

    A uniform integer in [0, 2**drop) is added to the magnitude's bits, then the low bits are cleared: the expected
    value is the input. Element i of `w` is element `start + i` of its parameter. Values that would leave the finite
    range, infinities and NaN stay.
    """
    key = mix(mix(seed + index * GOLDEN) + step) + start
    dither_rows(w.view(1, -1), drop=drop, keys=torch.full((1,), key, dtype=torch.int64, device=w.device))


def dither_rows(w: Tensor, *, drop: int, keys: Tensor) -> None:
    """`dither` of several parameters: rows of fp32 `w`, with int64 keys, one a row, on the device."""
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
    """A 32-bit integer hash (lowbias32, public domain by C. Wellons)."""
    x &= 0xFFFFFFFF
    x = ((x ^ x >> 16) * DITHER_1) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * DITHER_2) & 0xFFFFFFFF
    return x ^ x >> 16


def mix_tensor(x: Tensor) -> Tensor:
    """`mix` on an int64 tensor of values below 2**32."""
    x = ((x ^ (x >> 16)) * DITHER_1) & 0xFFFFFFFF
    # The second constant exceeds 2**31: the int64 product may wrap, which leaves its low 32 bits intact.
    x = ((x ^ (x >> 15)) * DITHER_2) & 0xFFFFFFFF
    return x ^ (x >> 16)
