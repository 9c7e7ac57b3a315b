"""Finds the weight that each running average (EMA) follows: the trained one of its name, or the nearest of its shape.

EMA objects keep their tensors under names of the model's (timm, AveragedModel, Lightning) or in a bare list (diffusers'
`shadow_params`). An average is near its own weight and near no other, so three short samples tell them apart. A wrong
answer costs size, and the average's error is then counted in another weight's steps; nothing else depends on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.choose.presets import MIN_NUMEL
from statecodec.choose.samples import sample
from statecodec.codecs.base import FLOATS
from statecodec.lazy import torch
from statecodec.roles import family

if TYPE_CHECKING:
    from torch import Tensor

_NEAR: Final = 0.5  # largest distance to its weight, in the average's rms, where no name tells
_MOST: Final = 4096  # weights of one shape that are compared

Place = tuple[str | None, tuple[int, ...]]


def followed(source: SourceCheckpoint) -> Mapping[str, SourceItem]:
    """Name of each running average -> the weight that it follows; averages without a certain weight are left out."""
    averages = [item for item in source.items if item.role == "ema" and _is_large(item)]
    if not averages:
        return {}
    weights = _Weights(source)
    nearest = ((average.name, weights.nearest(average)) for average in averages)
    return {name: weight for name, weight in nearest if weight is not None}


class _Weights:
    """The weights that an average may follow, by shape and by name: the trained ones, where there are any."""

    def __init__(self, source: SourceCheckpoint) -> None:
        self.source = source
        self._at: dict[Place, list[SourceItem]] = defaultdict(list)
        self._samples: dict[Place, Tensor] = {}
        for item in source.items:
            if family(item.role) == "weight" and item.role != "ema" and _is_large(item):
                for place in {(item.param, item.shape), (None, item.shape)}:
                    self._at[place].append(item)
        for items in self._at.values():
            items[:] = [item for item in items if item.name in source.trained] or items

    def nearest(self, average: SourceItem) -> SourceItem | None:
        """The nearest weight of the average's name; if no weight has it, the nearest of any name, if it is near."""
        named = (average.param, average.shape)
        place = named if average.param is not None and named in self._at else (None, average.shape)
        candidates = self._at.get(place, [])[:_MOST]
        if not candidates:
            return None
        own = _values(self.source, average)
        distances = (self._sampled(place, candidates) - own).square().mean(dim=1).nan_to_num(nan=torch.inf)
        least, index = distances.min(dim=0)
        certain = place[0] is not None or bool(least < _NEAR**2 * own.square().mean())
        return candidates[int(index)] if certain else None

    def _sampled(self, place: Place, items: Sequence[SourceItem]) -> Tensor:
        if place not in self._samples:
            self._samples[place] = torch.stack([_values(self.source, item) for item in items])
        return self._samples[place]


def _values(source: SourceCheckpoint, item: SourceItem) -> Tensor:
    return sample(source, item).to(torch.float64)


def _is_large(item: SourceItem) -> bool:
    return item.numel >= MIN_NUMEL and item.dtype in FLOATS and not item.bytes_only
