"""Between fp32, in which kernels decode, and the dtype of the tensor; and what that rounding adds to the error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from statecodec.elementwise import pieces
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def fp32_like(out: Tensor) -> Tensor:
    """Where a kernel decodes to: `out` itself if it is fp32, else an uninitialised fp32 tensor of its shape."""
    return out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)


def store(values: Tensor, out: Tensor) -> None:
    """Round decoded values of a finite tensor into `out`. Nothing is left to do if they are `out`.

    Rounding up to infinity stops at the largest value, such as 65504 for an fp16 tensor.

    Args:
        values: fp32, of as many elements; overwritten.
        out: Of any float dtype.
    """
    if values is out:
        return
    largest = min(torch.finfo(out.dtype).max, torch.finfo(values.dtype).max)
    source, target = values.view(-1), out.view(-1)
    for piece in pieces(out):
        target[piece].copy_(source[piece].clamp_(-largest, largest))


def rounding(bound: Tensor, x: Tensor) -> Tensor:
    """An error bound (float64) widened by the rounding to x's dtype and by that of the fp32 product."""
    unit = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134)}.get(x.dtype, (0.0, 0.0))
    size = x.to(torch.float64).abs() + bound
    return bound + size * (unit[0] + 2.0**-22) + unit[1] + 2.0**-149
