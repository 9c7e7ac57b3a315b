"""Which tensors are worth a low-rank prediction by default (`--pack auto`): moments in 16 bits.

Optimizers keep their moments in 16 bits where the weights that they train are in 16 bits, too. These are exact, so
their moments are all that there is to make smaller (docs/decisions/0028-predictions-by-default-in-16-bits.md).
"""

from __future__ import annotations

from statecodec.checkpoint.base import TensorInfo
from statecodec.dtypes import BFLOAT16, FLOAT16
from statecodec.roles import MOMENT_ROLES


def is_low_rank(item: TensorInfo) -> bool:
    """Whether `--pack auto` predicts the tensor's codes."""
    return item.role in MOMENT_ROLES and item.dtype in (BFLOAT16, FLOAT16)
