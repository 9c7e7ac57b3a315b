"""Which codes of a quantised state of FlashOptim share a scale.

A group is 32 codes in flat order. Under FSDP2 every rank begins its groups anew: a state that was put together from the
shards of N ranks has the groups of N ranks, and does not say how many there were. The number of its scales tells, and
where that fits several N, its codes do: values are divided by the largest of their group, so one code of every group is
the largest that there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from statecodec.errors import MalformedCheckpoint
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

GROUP: Final = 32
"""Codes in flat order that share a scale."""


def are_quantised(codes: Tensor, scales: Tensor) -> bool:
    """Whether their dtypes are those of a quantised moment."""
    return codes.dtype in (torch.int8, torch.uint8) and scales.dtype.is_floating_point


def fp32_scales(saved: Tensor) -> Tensor:
    """Scales, which are fp16; of bf16 parameters their bits are saved under bf16, so that torch casts nothing."""
    return (saved.view(torch.float16) if saved.dtype is torch.bfloat16 else saved).float()


@dataclass(frozen=True)
class FlashGroups:
    """The groups of a tensor whose rows were divided evenly among shards."""

    numel: int
    shards: int

    @property
    def count(self) -> int:
        """How many there are."""
        return self.shards * self._in_a_shard

    @property
    def _in_a_shard(self) -> int:
        return math.ceil(self.numel // self.shards / GROUP)

    @property
    def are_flat(self) -> bool:
        """Whether they are those of one shard."""
        return self.shards == 1 or self.numel // self.shards % GROUP == 0

    def of(self, places: Tensor) -> Tensor:
        """The group of every place in the flattened tensor."""
        size = max(self.numel // self.shards, 1)
        return places // size * self._in_a_shard + places % size // GROUP

    def explain(self, codes: Tensor, places: Tensor, scales: Tensor) -> bool:
        """Whether every group has a code of the largest size.

        Args:
            codes: some codes of the tensor; of groups that are not here in full, nothing is said.
            places: where in the flattened tensor they are.
            scales: one for each group. What was divided by 0 or infinity is not looked at.
        """
        scales = fp32_scales(scales)
        groups = self.of(places.reshape(-1))
        none = torch.zeros(self.count, dtype=torch.int32, device=codes.device)
        largest = none.scatter_reduce(0, groups, codes.reshape(-1).int().abs(), "amax")
        begins = torch.arange(self.count, device=codes.device) % max(self._in_a_shard, 1) * GROUP
        sizes = (self.numel // self.shards - begins).clamp(max=GROUP)
        told = (torch.bincount(groups, minlength=self.count) == sizes) & scales.isfinite() & (scales > 0)
        return bool((largest[told] == (255 if codes.dtype == torch.uint8 else 127)).all())


@dataclass(frozen=True)
class FlashMoment:
    """A quantised moment, of which a rank may hold a part."""

    shape: tuple[int, ...]  # of the whole
    scales: int  # how many of them there are
    held: Callable[[], tuple[Tensor, Tensor, Tensor]]  # codes that are here, their places in the whole, and all scales

    @property
    def possible(self) -> set[int]:
        """The numbers of shards that give so many scales."""
        return possible_shards(self.shape, self.scales)


def possible_shards(shape: tuple[int, ...], scales: int) -> set[int]:
    """The numbers of shards of a moment of that shape that give so many scales."""
    rows, numel = shape[0] if shape else 1, math.prod(shape)
    divisors = (n for k in range(1, math.isqrt(rows) + 1) if rows % k == 0 for n in (k, rows // k))
    return {n for n in divisors if FlashGroups(numel, n).count == scales}


def flash_shards(
    moments: Iterable[FlashMoment], agree: Callable[[Sequence[bool]], Sequence[bool]] = lambda own: own
) -> int:
    """In how many shards the rows of all parameters were when their moments were quantised; the fewest that fit.

    Args:
        moments: those of one run. Any whose scales fit no number at all is left out: to decode it is an error.
        agree: given this rank's answers to as many questions, those to which all ranks say yes.

    Raises MalformedCheckpoint if no number fits all of them.
    """
    kept = [(m, possible) for m in moments if math.prod(m.shape) and (possible := m.possible)]
    found = sorted(set.intersection(*(possible for _, possible in kept))) if kept else [1]
    if len(found) > 1:
        fits = [True] * len(found)
        for moment, _ in kept:
            groups = [FlashGroups(math.prod(moment.shape), n) for n in found]
            if not all(g.are_flat for g in groups):
                parts = moment.held()
                fits = [fit and g.explain(*parts) for fit, g in zip(fits, groups, strict=True)]
        found = [n for n, fit in zip(found, agree(fits), strict=True) if fit]
    if not found:
        raise MalformedCheckpoint(
            "scales of FlashOptim fit no number of ranks: those of all parameters have to be saved by as many"
        )
    return found[0]
