"""A few elements of a tensor, to compare it with others without a pass over the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from statecodec.checkpoint.base import Checkpoint, TensorInfo
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLE: Final = 64


def sample(checkpoint: Checkpoint, item: TensorInfo) -> Tensor:
    """Its first, middle and last 64 elements, or all three times where there are fewer."""
    size = min(item.numel, _SAMPLE)
    starts = (0, (item.numel - size) // 2, item.numel - size)
    return torch.cat([checkpoint.elements(item, at, at + size) for at in starts])
