"""Where Megatron-LM's distributed optimizer puts parameters in its flat buffers, by its source; no file says it.

A buffer holds the parameters of one dtype of one part of the model, in the reverse of the model's order, each from a
multiple of 64 on (in early versions end to end). Experts may have buffers of their own. The size of a buffer tells
which of these it is, if exactly one fits; it does not tell which of two parameters of one size is where. So what is
found here are shapes, never names, and whoever relies on them has to compare the numbers.

Source: megatron/core/distributed/param_and_grad_buffer.py.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

from statecodec.layouts.base import Run, Shape
from statecodec.layouts.flat import Fragment, Param
from statecodec.layouts.pickle.nodes import DictNode, TensorNode
from statecodec.layouts.walk import walk

_ALIGNMENTS: Final = (64, 1)
_PART: Final = re.compile(r"model\d*")
_EXPERTS: Final = re.compile(r"(?:^|\.)(?:local_)?experts\.")

_Placed: TypeAlias = "tuple[tuple[Shape, int], ...]"
"""The parameters in a buffer: shape, and first element."""


class BufferOrder:
    """The buffers that an optimizer of a rank's model may have; none where the model is not known."""

    def __init__(self) -> None:
        self._by_size: dict[int, list[_Placed]] = defaultdict(list)

    @classmethod
    def of(cls, root: Any, limit: int) -> BufferOrder:
        """From the objects of `model_optim_rng.pt`, which may name so many tensors."""
        order = cls()
        for weights in _parts(root, limit):
            for size, placed in {_placed(shapes, to) for shapes in _divided(weights) for to in _ALIGNMENTS}:
                order._by_size[size].append(placed)
        return order

    def take(self, numel: int) -> list[Fragment]:
        """The parameters in a buffer of so many elements; none if not exactly one order fits.

        An order serves one buffer: of the parts of a model each has its own.
        """
        fitting = self._by_size.get(numel, [])
        if len(set(fitting)) != 1:
            return []
        params = [(Param(str(i), shape, math.prod(shape)), at) for i, (shape, at) in enumerate(fitting.pop())]
        return [Fragment(param, Run(0, param.numel), at) for param, at in params]


def _parts(root: Any, limit: int) -> Iterator[list[tuple[str, TensorNode]]]:
    """The weights of each part of the model (it has several if pipeline stages are interleaved), in its order."""
    model = DictNode()
    entries = root.items if type(root) is DictNode else ()
    model.items = [(key, value) for key, value in entries if type(key) is str and _PART.fullmatch(key)]
    parts: dict[str, list[tuple[str, TensorNode]]] = defaultdict(list)
    seen = set()
    for path, node in walk(model, limit):
        if type(node) is TensorNode and node.dtype.is_floating_point and 0 not in node.shape:
            window = (node.storage.key, node.offset, node.shape)  # tied weights are one parameter
            if window not in seen:
                seen.add(window)
                parts[path.top].append((str(path), node))
    yield from parts.values()


def _divided(weights: Sequence[tuple[str, TensorNode]]) -> Iterator[tuple[Shape, ...]]:
    """The shapes of what may share a buffer: all of one dtype, or those that are experts, or that are none."""
    by_dtype: dict[Any, list[tuple[Shape, bool]]] = defaultdict(list)
    for path, node in weights:
        by_dtype[node.dtype].append((node.shape, _EXPERTS.search(path) is not None))
    for of_dtype in by_dtype.values():
        yield tuple(shape for shape, _ in of_dtype)
        for wanted in (False, True):
            yield tuple(shape for shape, is_expert in of_dtype if is_expert is wanted)


def _placed(shapes: Sequence[Shape], alignment: int) -> tuple[int, _Placed]:
    """The size of a buffer of these parameters, and where they are in it."""
    end, placed = 0, []
    for shape in reversed(shapes):
        start = -(-end // alignment) * alignment
        placed.append((shape, start))
        end = start + math.prod(shape)
    return end, tuple(placed)
