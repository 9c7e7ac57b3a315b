"""How wide the cells of a linear grid are for an error that is asked for."""

from __future__ import annotations

import math
from dataclasses import replace

from statecodec.checkpoint.source_items import SourceItem
from statecodec.codecs import Codec, Direction, Following, Uniform
from statecodec.kernels.grids import MAX_STEP, MIN_STEP
from statecodec.kernels.reference.statistics import Comparison
from statecodec.lazy import torch

SQRT12 = math.sqrt(12.0)  # an error that is uniform over a step has an rms of step / sqrt(12)
ROUNDED = math.sqrt(0.5)  # share of an error that rounding to a dtype may have; beyond it a tensor is kept exact
_SPREAD = 2.0  # 4.5 standard deviations of the error of values that spread over the cells, times sqrt(numel)
_NARROW = 0.2  # relative rms error of rounding to a dtype, in its eps


def width_for(most: float, item: SourceItem, rms: float) -> float:
    """The step of a grid with a rounding error of rms `most`, for values of that rms that spread over its cells."""
    error = math.sqrt(max(most**2 - narrow(item, rms) ** 2, (most * ROUNDED) ** 2))
    return legal(error * SQRT12 * (1.0 - min(_SPREAD / math.sqrt(item.numel), 0.1)))


def finer(codec: Codec, most: float, sums: Comparison, numel: int) -> Codec | None:
    """The codec to encode a tensor with again that came out with an rms error above `most`; None if it did not.

    A few tries come near; then follows a step that is certain, as no rounding error is larger than half of it.
    """
    rms = math.sqrt(sums.sum_sq_diff / numel) if numel else 0.0
    certain = 2 * 0.999 * most
    if not isinstance(codec, Uniform | Following | Direction) or rms <= most or codec.step <= certain:
        return None
    near = 0.97 * codec.step * most / rms
    return replace(codec, step=legal(near if codec.step > 1.5 * certain else min(near, certain)))


def legal(step: float) -> float:
    """The nearest step that a grid can have."""
    return min(max(step, MIN_STEP), MAX_STEP)


def narrow(item: SourceItem, rms: float) -> float:
    """The rms error of rounding decoded values of that rms to the tensor's dtype."""
    return _NARROW * torch.finfo(item.dtype.torch).eps * rms
