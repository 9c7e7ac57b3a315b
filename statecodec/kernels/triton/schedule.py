"""In what order a fused launch does its work, and how a parameter is cut up for it. Pure arithmetic on shapes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from statecodec.kernels.triton.runtime import INTERPRETED

# Pieces of a shared second moment's probe: HIGH rows of WIDE elements, or TALL rows of BROAD columns.
HIGH, WIDE, TALL, BROAD = (64, 256, 128, 128) if INTERPRETED else (16, 2048, 512, 64)


def schedule(
    probes: Sequence[int], updates: Sequence[int], nbytes: Sequence[int], ahead: int
) -> Iterator[NDArray[np.int32]]:
    """Work items (slot, tile), probes as -1 - tile: a slot's probes, then, `ahead` probed bytes later, its updates."""

    def items(slot: int, tiles: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.stack((np.full_like(tiles, slot), tiles), -1)

    waiting: deque[int] = deque()
    probed = 0
    for slot in range(len(probes)):
        yield items(slot, -1 - np.arange(probes[slot], dtype=np.int32))
        waiting.append(slot)
        probed += nbytes[slot]
        while waiting and probed - nbytes[waiting[0]] >= ahead:
            done = waiting.popleft()
            probed -= nbytes[done]
            yield items(done, np.arange(updates[done], dtype=np.int32))
    for slot in waiting:
        yield items(slot, np.arange(updates[slot], dtype=np.int32))


def rows_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    """The two-dimensional view of a shape, as `codecs.base` has it."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def planes(shape: tuple[int, ...], dims: tuple[int, ...] | None) -> tuple[int, int, int]:
    """(outer, shared, inner) of a shape, for consecutive shared dimensions."""
    if dims is None:
        return 0, 0, 0
    outer, shared, inner = shape[: dims[0]], shape[dims[0] : dims[-1] + 1], shape[dims[-1] + 1 :]
    return math.prod(outer), math.prod(shared), math.prod(inner)


def pieces(outer: int, shared: int, inner: int) -> tuple[int, int]:
    """How many probes look at such a parameter, and how many partial sums they leave."""
    if inner == 1:
        along = -(-shared // WIDE)
        return max(1, -(-outer // HIGH) * along), along * outer
    along = -(-shared // TALL)
    return max(1, outer * along * -(-inner // BROAD)), along * outer * inner
