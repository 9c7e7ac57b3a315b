"""Which tensors are worth a low-rank prediction by default (`--pack auto`): moments in 16 bits, and momenta.

They are all that an optimizer keeps beside weights which are exact, or hardly smaller than they were
(docs/decisions/0028-predictions-by-default-in-16-bits.md, 0030-momenta-are-predicted.md).
"""

from __future__ import annotations

from statecodec.checkpoint.base import TensorInfo
from statecodec.dtypes import BFLOAT16, FLOAT16
from statecodec.roles import MOMENT_ROLES


def is_low_rank(item: TensorInfo) -> bool:
    """Whether `--pack auto` predicts the tensor's codes."""
    return item.role == "momentum" or (item.role in MOMENT_ROLES and item.dtype in (BFLOAT16, FLOAT16))
