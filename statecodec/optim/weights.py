"""The weight as a step sees it: fp32 values, whatever the parameter is stored as.

With master weights the model's bf16 or fp16 parameter is the high part of a split and the optimizer keeps the low part,
so the forward pass runs on the rounded weight and the step on 24 or 32 bits of it (FlashOptim section 3.1; arithmetic:
`codecs.Split`).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from statecodec import kernels
from statecodec.codecs import Split
from statecodec.errors import OptimizerError
from statecodec.optim.tiles import Tile, TileBuffers

_HIGH = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_LOW_BITS = {"split24": 8, "split32": 16}
MASTER_WEIGHTS = (None, *_LOW_BITS)


def split_codec(dtype: torch.dtype, master_weights: str | None) -> Split | None:
    """The split whose high part is a parameter of this dtype; None where the parameter is its own master weight."""
    if master_weights is None or dtype not in _HIGH:
        return None
    if master_weights not in _LOW_BITS:
        raise OptimizerError(f"master_weights={master_weights!r}, expected split24, split32 or None")
    return Split(_HIGH[dtype], _LOW_BITS[master_weights])


@dataclass(frozen=True)
class Dither:
    """Stochastic rounding of the bits that the stored weight drops.

    The draw depends on nothing but the fields and the element.

    Args:
        seed: The group's seed.
        index: Position of the parameter among all.
        step: The step.
        start: Position of a shard's first element.
    """

    seed: int
    index: int
    step: int
    start: int = 0


@dataclass(frozen=True)
class StoredWeight:
    """One parameter (contiguous), the low part of its split, and how to round."""

    param: Tensor
    low: Tensor | None
    codec: Split | None
    dither: Dither | None
    scratch: TileBuffers
    backend: kernels.Backend
    arithmetic: ModuleType

    def parts(self, tile: Tile) -> list[Tensor]:
        """What is stored of a tile: the parameter, and the low part if there is one."""
        stored = [self.param] if self.low is None else [self.param, self.low]
        return [x.view(-1)[tile.start : tile.stop].view(tile.rows, tile.cols) for x in stored]

    def load(self, tile: Tile) -> Tensor:
        """The values of a tile: a view of an fp32 or fp64 parameter, a scratch buffer otherwise."""
        high = self.param.view(-1)[tile.start : tile.stop].view(tile.rows, tile.cols)
        if high.dtype in (torch.float32, torch.float64):
            return high
        values = self.scratch.take("weight", (tile.rows, tile.cols), torch.float32, high.device)
        if self.low is None or self.codec is None:
            return values.copy_(high)
        low = self.low.view(-1)[tile.start : tile.stop]
        self.codec.decode_into({"high": high.view(-1), "low": low}, values.view(-1), self.backend)
        return values

    def store(self, tile: Tile, values: Tensor) -> None:
        """Write the values of a tile back. Raises UnencodableValues where an fp16 weight leaves fp16's range."""
        high = self.param.view(-1)[tile.start : tile.stop]
        if high.dtype in (torch.float32, torch.float64):
            return
        values = values.view(-1)
        drop = 16 if self.low is None else 16 - 8 * self.low.element_size()
        if self.dither is not None and drop:
            d = self.dither
            self.arithmetic.dither(
                values, drop=drop, seed=d.seed, index=d.index, step=d.step, start=d.start + tile.start
            )
        if self.low is None or self.codec is None:
            high.copy_(values)
        else:
            low = self.low.view(-1)[tile.start : tile.stop]
            self.codec.encode_into(values, {"high": high, "low": low}, self.backend)


def whole(param: Tensor) -> Tile:
    """The whole parameter as one tile, for methods that need all of it at once."""
    rows = param.shape[0] if param.ndim > 1 else 1
    return Tile(0, param.numel(), rows, param.numel() // max(rows, 1))
