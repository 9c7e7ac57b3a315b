"""Sums over ranks of what a state pools along a sharded dimension: one collective for all parameters of a group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from statecodec.optim.method import Recipe


def start(recipes: Sequence[Recipe], gradients: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to add up the methods' `partial` over the ranks that hold other parts of the same parameters.

    Returns a function that waits for the sums, in order. Every rank must call both with the same parameters.
    """
    partials = [recipe.method.partial(grad, recipe) for recipe, grad in zip(recipes, gradients, strict=True)]
    alike: dict[Any, list[int]] = defaultdict(list)
    for at, (recipe, partial) in enumerate(zip(recipes, partials, strict=True)):
        alike[recipe.across, partial.device].append(at)
    sums = [_Sum(across, [partials[at] for at in positions]) for (across, _), positions in alike.items()]

    def wait() -> list[Tensor]:
        for total, positions in zip(sums, alike.values(), strict=True):
            for at, value in zip(positions, total.wait(), strict=True):
                partials[at] = value
        return partials

    return wait


class _Sum:
    """Several tensors added up over the ranks of one or more process groups, as one message."""

    def __init__(self, across: Sequence[Any], terms: Sequence[Tensor]) -> None:
        import torch.distributed as dist

        self._shapes, self._rest = [t.shape for t in terms], across[1:]
        self._flat = torch.cat([t.reshape(-1) for t in terms])
        self._work = dist.all_reduce(self._flat, group=across[0], async_op=True)

    def wait(self) -> list[Tensor]:
        import torch.distributed as dist

        if self._work is not None:
            self._work.wait()
        for group in self._rest:
            dist.all_reduce(self._flat, group=group)
        pieces = torch.split(self._flat, [s.numel() for s in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
