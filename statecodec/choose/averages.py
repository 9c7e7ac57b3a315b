"""Finds the weight that each running average (EMA) follows: the trained one of its name, or the nearest of its shape.

EMA objects keep their tensors under names of the model's (timm, AveragedModel, Lightning) or in a bare list (diffusers'
`shadow_params`). An average is near its own weight and near no other, so three short samples tell them apart. A wrong
answer costs size, and the average's error is then counted in another weight's steps; nothing else depends on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from statecodec.checkpoint.base import Checkpoint, TensorInfo
from statecodec.choose.presets import is_small
from statecodec.choose.samples import sample
from statecodec.codecs.base import FLOATS
from statecodec.lazy import torch
from statecodec.roles import family

if TYPE_CHECKING:
    from torch import Tensor

_NEAR: Final = 0.5  # largest distance to its weight, in the average's rms, where no name tells
_MOST: Final = 4096  # weights of one shape that are compared

Place = tuple[str | None, tuple[int, ...]]


def followed(checkpoint: Checkpoint, *, small: bool = False) -> Mapping[str, str]:
    """Name of each running average -> that of the weight that it follows, in whatever file that is.

    Averages without a certain weight are left out, and those that stay exact for their size unless `small`.
    """
    able = [i for i in checkpoint.items if i.numel and i.dtype in FLOATS and (small or not is_small(i.shape))]
    averages = [item for item in able if item.role == "ema"]
    if not averages:
        return {}
    weights = _Weights(checkpoint, [item for item in able if family(item.role) == "weight" and item.role != "ema"])
    nearest = ((average.name, weights.nearest(average)) for average in averages)
    return {name: weight for name, weight in nearest if weight is not None}


class _Weights:
    """The weights that an average may follow, by shape and by name: the trained ones, where there are any."""

    def __init__(self, checkpoint: Checkpoint, weights: Iterable[TensorInfo]) -> None:
        self._checkpoint = checkpoint
        self._at: dict[Place, list[TensorInfo]] = defaultdict(list)
        self._samples: dict[Place, Tensor] = {}
        for weight in weights:
            for place in {(weight.param, weight.shape), (None, weight.shape)}:
                self._at[place].append(weight)
        for items in self._at.values():
            items[:] = [item for item in items if item.name in checkpoint.trained] or items

    def nearest(self, average: TensorInfo) -> str | None:
        """The nearest weight of the average's name; if no weight has it, the nearest of any name, if it is near."""
        named = (average.param, average.shape)
        place = named if average.param is not None and named in self._at else (None, average.shape)
        candidates = self._at.get(place, [])[:_MOST]
        if not candidates:
            return None
        own = self._values(average)
        distances = (self._sampled(place, candidates) - own).square().mean(dim=1).nan_to_num(nan=torch.inf)
        least, index = distances.min(dim=0)
        certain = place[0] is not None or bool(least < _NEAR**2 * own.square().mean())
        return candidates[int(index)].name if certain else None

    def _sampled(self, place: Place, items: Sequence[TensorInfo]) -> Tensor:
        if place not in self._samples:
            self._samples[place] = torch.stack([self._values(item) for item in items])
        return self._samples[place]

    def _values(self, item: TensorInfo) -> Tensor:
        return sample(self._checkpoint, item).to(torch.float64)
