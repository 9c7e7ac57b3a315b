"""How other optimizers keep quantised states, shared by what finds them and what decodes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from statecodec.errors import MalformedCheckpoint
from statecodec.flash_groups import GROUP, FlashGroups, are_quantised, fp32_scales, possible_shards
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

WRAPPED: Final = "__bnb_optimizer_quant_state__"
"""The key of one parameter's state under which newer versions of bitsandbytes put all but the step."""

FLASH_CODES: Final = "::quantized"
FLASH_SCALES: Final = "::scales"
"""What FlashOptim appends to a state's key."""
FLASH_LOW_BITS: Final = "error_bits"
"""Its key of what a master weight has beyond its parameter, as a fraction of half a unit in the last place."""

TORCHAO: Final = {"OptimState8bit": 8, "OptimState4bit": 4, "OptimStateFp8": 8}
"""torchao's subclasses of Tensor -> bits a number; their module has moved between versions."""

PACKAGES: Final = ("bitsandbytes", "torchao", "flashoptim")


_BLOCKS: Final = (256, 2048)  # of bitsandbytes today, and before 0.45


def of_flashoptim(name: str, codes: Tensor, places: Tensor, scales: Tensor, groups: FlashGroups) -> Tensor:
    """Numbers of a moment of FlashOptim in fp32, of the shape of its codes.

    Args:
        name: what messages call it.
        codes: int8 of a first moment, uint8 of a second one; all of them, or some.
        places: int64, where in the flattened moment each of them is.
        scales: fp16, one for each group; or their bits under the dtype bf16, where parameters are bf16.
        groups: which codes share a scale.

    Raises MalformedCheckpoint for parts that do not fit together.
    """
    if not are_quantised(codes, scales) or scales.numel() != groups.count:
        raise MalformedCheckpoint(
            f"{name}: {scales.numel()} {scales.dtype} scales for {groups.numel} {codes.dtype} codes of FlashOptim"
            + (f", saved by {groups.shards} ranks" if groups.shards > 1 else "")
        )
    own = fp32_scales(scales).reshape(-1)[groups.of(places)]
    if codes.dtype is torch.uint8:  # the root of a second moment
        return (codes.float() / 255 * own).square()
    softsign = codes.float() / 127
    return softsign / (2 - softsign.abs()) * own


@dataclass(frozen=True)
class Blocks:
    """How a quantised state is divided into blocks that have a scale each.

    Args:
        package: of PACKAGES.
        bits: of a number.
        shape: of the state.
        scales: how many scales.
    """

    package: str
    bits: int
    shape: tuple[int, ...]
    scales: int

    @property
    def numel(self) -> int:
        """How many numbers the state has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int | None:
        """Numbers of a block, in flat order; None where so many scales do not say."""
        if self.package == "flashoptim":
            shards = possible_shards(self.shape, self.scales)
            flat = shards and all(FlashGroups(self.numel, n).are_flat for n in shards)
            return GROUP if flat else None
        if self.package == "bitsandbytes":
            return next((size for size in _BLOCKS if math.ceil(self.numel / size) == self.scales), None)
        return self.numel // self.scales if self.scales and self.numel % self.scales == 0 else None

    def decode(self, name: str, codes: Tensor, scales: Tensor, table: Tensor | None) -> Tensor:
        """Numbers of whole blocks, as flat fp32.

        Args:
            name: what messages call the state.
            codes: of some blocks, and perhaps of the last, which may be short.
            scales: of these blocks.
            table: what codes stand for, unless they are numbers themselves.

        Raises MalformedCheckpoint for parts that do not fit together.
        """
        codes = codes.reshape(-1)
        if self.package == "flashoptim":
            places = torch.arange(codes.numel(), device=codes.device)
            return of_flashoptim(name, codes, places, scales, FlashGroups(codes.numel(), 1))
        if self.bits == 4:
            codes = torch.stack([codes >> 4, codes & 15], dim=-1).reshape(-1)
        size = self.size
        if size is None or math.ceil(codes.numel() / size) != scales.numel():
            raise MalformedCheckpoint(
                f"{name}: {self.scales} scales for {self.numel} numbers of {self.package} are not one a block"
            )
        numbers = codes.float() if codes.dtype.is_floating_point else _looked_up(codes, table, name)
        return numbers * scales.reshape(-1).float().repeat_interleave(size)[: numbers.numel()]


def _looked_up(codes: Tensor, table: Tensor | None, name: str) -> Tensor:
    entries = 0 if table is None or table.dim() != 1 else table.numel()
    if table is None or codes.dtype is not torch.uint8 or (codes.numel() and int(codes.max()) >= entries):
        raise MalformedCheckpoint(f"{name}: {codes.dtype} codes that are not all in their table of {entries}")
    return table.float()[codes.int()]
