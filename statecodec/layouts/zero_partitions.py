"""Which elements of which parameters the flat partitions of DeepSpeed's ZeRO hold.

Stages 1 and 2 put a group's parameters end to end and cut that into equal partitions, one a rank: a parameter may lie
in several. Stage 3 cuts every parameter into equal partitions. What does not fill the last partition is padding.

Source: deepspeed/utils/zero_to_fp32.py and runtime/zero/stage_1_and_2.py of DeepSpeed 0.16.9.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Final

from statecodec.errors import MalformedCheckpoint
from statecodec.layouts.base import Run
from statecodec.layouts.flat import Fragment, Param
from statecodec.layouts.pickle.nodes import DictNode
from statecodec.names import shown

_MAX_RANK: Final = 64


class PartitionedGroup:
    """Stages 1 and 2: one group, end to end, cut into partitions.

    Args:
        params: The group's, in order.
        partition: Elements in a partition; behind the last parameter they are padding.
    """

    def __init__(self, params: Sequence[Param], partition: int) -> None:
        self._params, self._partition = params, partition
        self._starts = [0, *accumulate(p.numel for p in params)]

    def sizes(self, rank: int) -> tuple[int, int]:
        """Elements that a rank's flat tensors may have: without padding, and with it."""
        return max(min(self._starts[-1] - rank * self._partition, self._partition), 0), self._partition

    def fragments(self, rank: int) -> Iterator[Fragment]:
        """What a rank's partition holds, in order."""
        start = rank * self._partition
        stop = start + self.sizes(rank)[0]
        for number in range(max(bisect_right(self._starts, start) - 1, 0), len(self._params)):
            first = self._starts[number]
            begin, end = max(first, start), min(self._starts[number + 1], stop)
            if first >= stop:
                break
            if begin < end:
                yield Fragment(self._params[number], Run(begin - first, end - first), begin - start)


class PartitionedParams:
    """Stage 3: every parameter of a group cut into partitions."""

    def __init__(self, params: Sequence[Param], ranks: int) -> None:
        self._params, self._ranks = params, ranks
        self._partitions = [-(-p.numel // ranks) for p in params]

    def sizes(self, rank: int) -> tuple[int, int]:
        """As of PartitionedGroup; here padding stands behind every parameter, and is always there."""
        return sum(self._partitions), sum(self._partitions)

    def fragments(self, rank: int) -> Iterator[Fragment]:
        """What a rank's partitions hold, in order."""
        at = 0
        for param, size in zip(self._params, self._partitions, strict=True):
            start, stop = (min(r * size, param.numel) for r in (rank, rank + 1))
            if start < stop:
                yield Fragment(param, Run(start, stop), at)
            at += size


def read_params(node: Any, where: str) -> list[Param]:
    """The parameters of one dict of names and shapes, in order. Raises MalformedCheckpoint."""
    params = []
    for name, shape in node.items if type(node) is DictNode else ():
        sizes = tuple(shape) if isinstance(shape, tuple) else None
        if type(name) is not str or sizes is None or len(sizes) > _MAX_RANK:
            raise MalformedCheckpoint(f"{where}: names and shapes were expected where {name!r:.40} stands")
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in sizes):
            raise MalformedCheckpoint(f"{where}: the shape of {shown(name)!r:.80} is no shape")
        params.append(Param(name, sizes, math.prod(sizes)))
    return params
