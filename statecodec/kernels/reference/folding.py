"""Block means along the rows (FOAM: fold and unfold), with the true mean in a row's tail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from statecodec.kernels import INF, NAN
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def fold_mean(x: Tensor, out: Tensor, *, block: int) -> int:
    """Means of neighbours in a row.

    The sum is a binary tree over neighbours, so that every backend rounds alike; a short tail divides by its own
    length.

    Args:
        x: fp32, rows x cols.
        out: Written: fp32, rows x ceil(cols / block).
        block: Values per mean, a power of two.

    Returns:
        The flags NAN | INF if a block's sum is not finite.

    Source:
        FOAM (arXiv 2512.07112), with the true mean in a row's tail.
    """
    rows, cols = x.shape
    blocks = -(-cols // block)
    total = torch.nn.functional.pad(x, (0, blocks * block - cols)).view(rows, blocks, block)
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    total = total.squeeze(-1)
    count = torch.full((blocks,), float(block), dtype=torch.float32, device=x.device)
    if cols % block:
        count[-1] = float(cols % block)
    out.copy_(total / count)
    return NAN * bool(total.isnan().any()) | INF * bool(total.isinf().any())


def unfold(mean: Tensor, out: Tensor, *, block: int) -> None:
    """Repeat every mean over its block.

    Args:
        mean: fp32, rows x ceil(cols / block).
        out: Written: fp32, rows x cols.
        block: Values per mean.
    """
    out.copy_(mean.repeat_interleave(block, -1)[:, : out.shape[-1]])
