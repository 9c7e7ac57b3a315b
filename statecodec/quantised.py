"""How other optimizers keep quantised states, shared by what finds them and what decodes them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from statecodec.errors import MalformedCheckpoint
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

_FLASH_GROUP: Final = 32


def of_flashoptim(name: str, codes: Tensor, scales: Tensor) -> Tensor:
    """A moment of FlashOptim in fp32, of the shape of its codes.

    Args:
        name: what messages call it.
        codes: int8 of a first moment, uint8 of a second one.
        scales: fp16, one for 32 codes in flat order; or their bits under the dtype bf16, where parameters are bf16.

    Raises MalformedCheckpoint for parts that do not fit together.
    """
    if scales.dtype is torch.bfloat16:
        scales = scales.view(torch.float16)  # so that torch casts nothing
    fit = codes.dtype in (torch.int8, torch.uint8) and scales.dtype.is_floating_point
    if not fit or scales.numel() != math.ceil(codes.numel() / _FLASH_GROUP):
        raise MalformedCheckpoint(
            f"{name}: {scales.numel()} {scales.dtype} scales for {codes.numel()} {codes.dtype} codes of FlashOptim"
        )
    if codes.dtype is torch.uint8:  # the root of a second moment
        return scaled(codes.float() / 255, scales, _FLASH_GROUP).square()
    softsign = codes.float() / 127
    return scaled(softsign / (2 - softsign.abs()), scales, _FLASH_GROUP)


def scaled(numbers: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each block of numbers, in flat order, times its scale; the last one may be short."""
    flat = numbers.reshape(-1)
    return (flat * scales.reshape(-1).float().repeat_interleave(block)[: flat.numel()]).reshape(numbers.shape)
