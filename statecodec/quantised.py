"""How other optimizers keep quantised states, shared by what finds them and what decodes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from statecodec.errors import MalformedCheckpoint
from statecodec.flash_groups import FlashGroups, are_quantised, fp32_scales
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


def scaled(numbers: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each block of numbers, in flat order, times its scale; the last one may be short."""
    flat = numbers.reshape(-1)
    return (flat * scales.reshape(-1).float().repeat_interleave(block)[: flat.numel()]).reshape(numbers.shape)
