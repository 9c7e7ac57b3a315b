"""Keeps numbers that are not finite local: the smallest unit that shares a stored number keeps its old bytes.

A step computes a tile of new weights and states. Where any of them is NaN, infinite or too large to be stored, the unit
keeps what it had, in weight and states alike, and is counted. A unit is what the codecs cannot cut: an element, a group
of a companded state, a block of a folded one. Fused steps do the same (see `kernels.fused`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statecodec.kernels.fused import LARGEST, LARGEST_FP16
from statecodec.optim.tiles import StateTile, Tile
from statecodec.optim.weights import StoredWeight


def below(x: Tensor, limit: float) -> bool:
    """Whether every |x| is below `limit`: one pass, no temporaries; NaN fails both comparisons."""
    if not x.numel():
        return True
    low, high = torch.aminmax(x)
    return bool(low > -limit) and bool(high < limit)


class TileStep:
    """One tile of a parameter and its states: loaded, stepped in place by the caller, then stored."""

    def __init__(self, weight: StoredWeight, states: Sequence[StateTile], tile: Tile, unit: int) -> None:
        self._stored, self._states, self._tile, self._unit = weight, states, tile, unit
        self.weight = weight.load(tile)
        self.values = [s.values for s in self._states]
        # Values that are stepped in place are copied first; encoded ones keep their old bytes until they are stored.
        self._before = {
            x.data_ptr(): weight.scratch.take(f"before {k}", tuple(x.shape), x.dtype, x.device).copy_(x)
            for k, x in enumerate((self.weight, *self.values))
            if x.data_ptr() in {part.data_ptr() for part, _ in self._parts()}
        }

    def store(self) -> int:
        """Encode what the step has made of weight and states; returns how many units kept their old bytes."""
        largest = LARGEST_FP16 if self._stored.param.dtype == torch.float16 else LARGEST
        stepped = [
            (self.weight, self._unit, largest),
            *((s.values, s.width(self._unit), LARGEST) for s in self._states),
        ]
        if all(below(x, limit) for x, _, limit in stepped):
            self._encode()
            return 0
        bad = torch.zeros(
            self._tile.rows, -(-self._tile.cols // self._unit), dtype=torch.bool, device=self.weight.device
        )
        for x, width, limit in stepped:
            wrong = (x.abs() < limit).logical_not_().view(self._tile.rows, -1)
            padded = torch.nn.functional.pad(wrong, (0, bad.shape[1] * width - wrong.shape[1]))
            bad |= padded.view(*bad.shape, width).any(-1)
        old = [(part, self._before.get(part.data_ptr(), part).clone(), width) for part, width in self._parts()]
        for x, width, _ in stepped:
            x.masked_fill_(self._spread(bad, width, x), 0)
        self._encode()
        for part, before, width in old:
            part.copy_(torch.where(self._spread(bad, width, part), before, part))
        return int(bad.sum())

    def _encode(self) -> None:
        for state in self._states:
            state.store()
        self._stored.store(self._tile, self.weight)

    def _parts(self) -> list[tuple[Tensor, int]]:
        """Everything that is stored of this tile, and how many columns of it make up a unit."""
        weight = [(part, self._unit) for part in self._stored.parts(self._tile)]
        return [*weight, *(pair for s in self._states for pair in s.parts_by_unit(self._unit))]

    @staticmethod
    def _spread(bad: Tensor, width: int, like: Tensor) -> Tensor:
        """The mask of units as a mask of something that has `width` columns in each."""
        cols = like.numel() // bad.shape[0]
        return bad.repeat_interleave(width, 1)[:, :cols].reshape(like.shape)
