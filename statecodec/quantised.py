"""The names under which other optimizers keep quantised states, shared by what finds them and what decodes them."""

from __future__ import annotations

from typing import Final

WRAPPED: Final = "__bnb_optimizer_quant_state__"
"""The key of one parameter's state under which newer versions of bitsandbytes put all but the step."""

FLASH_CODES: Final = "::quantized"
FLASH_SCALES: Final = "::scales"
"""What FlashOptim appends to a state's key."""

TORCHAO: Final = {"OptimState8bit": 8, "OptimState4bit": 4, "OptimStateFp8": 8}
"""torchao's subclasses of Tensor -> bits a number; their module has moved between versions."""

PACKAGES: Final = ("bitsandbytes", "torchao", "flashoptim")
