"""Parts of a tensor: whether they cover all of it exactly once, and whether one is a single run of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Final

from statecodec.layouts.base import Box, Run, Shape

_MAX_COMPARISONS: Final = 1_000_000


def are_whole(shape: Shape, parts: Sequence[Box] | Sequence[Run]) -> bool:
    """Whether boxes, or runs, of a tensor cover every element exactly once.

    False as well for boxes that are too many and too entangled to tell; no sharding makes such boxes.
    """
    numel = math.prod(shape)
    runs = sorted((part for part in parts if isinstance(part, Run)), key=attrgetter("start"))
    boxes = [part for part in parts if isinstance(part, Box)]
    if runs:
        ends = [(run.start, run.stop) for run in runs]
        joined = all(stop == start for (_, stop), (start, _) in pairwise(ends))
        return not boxes and joined and (ends[0][0], ends[-1][1]) == (0, numel) and all(a <= b for a, b in ends)
    if not all(len(box.offset) == len(box.shape) == len(shape) for box in boxes):
        return False
    inside = all(
        o >= 0 and n >= 0 and o + n <= whole
        for box in boxes
        for o, n, whole in zip(box.offset, box.shape, shape, strict=True)
    )
    return inside and sum(math.prod(box.shape) for box in boxes) == numel and not _overlap(boxes)


def is_run(box: Box, shape: Shape) -> bool:
    """Whether a box of a row-major tensor is one run of its elements: whole along every dimension but its first."""
    first = next((k for k, n in enumerate(box.shape) if n != 1), len(shape))
    return box.shape[first + 1 :] == shape[first + 1 :]


def _overlap(boxes: Sequence[Box]) -> bool:
    solid = sorted((box for box in boxes if math.prod(box.shape)), key=attrgetter("offset"))
    open_ones: list[Box] = []
    work = 0
    for box in solid:
        open_ones = [b for b in open_ones if not box.offset or b.offset[0] + b.shape[0] > box.offset[0]]
        work += len(open_ones)
        if work > _MAX_COMPARISONS or any(_meet(box, other) for other in open_ones):
            return True
        open_ones.append(box)
    return False


def _meet(a: Box, b: Box) -> bool:
    return all(o < p + m and p < o + n for o, n, p, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True))
