"""Parts of a tensor that are all of it, once; and a document's tensors that say so untruly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statecodec.checkpoint import joined
from statecodec.checkpoint.joined import NamedTensor
from statecodec.dtypes import FLOAT32
from statecodec.errors import FormatError
from statecodec.layouts import Box, Run
from statecodec.layouts.parts import are_whole, is_run


@given(st.data())
def test_runs_against_counting(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(offset, tuple(data.draw(st.integers(1, n - o)) for o, n in zip(offset, shape, strict=True)))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    inside = numbers[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].reshape(-1)
    assert is_run(box, shape) == (inside == np.arange(inside[0], inside[0] + len(inside))).all()


@given(st.data())
def test_boxes_against_counting(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    counts = np.zeros(shape, int)
    boxes = []
    for _ in range(data.draw(st.integers(0, 5))):
        offset = tuple(data.draw(st.integers(0, n)) for n in shape)
        size = tuple(data.draw(st.integers(0, n - o)) for o, n in zip(offset, shape, strict=True))
        boxes.append(Box(offset, size))
        counts[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))] += 1
    assert are_whole(shape, boxes) == bool((counts == 1).all())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_cuts_along_a_grid_are_whole(cuts: list[int], rng: Any) -> None:
    starts = [sum(cuts[:i]) for i in range(len(cuts))]
    boxes = [Box((s, t), (n, m)) for s, n in zip(starts, cuts, strict=True) for t, m in zip(starts, cuts, strict=True)]
    runs = [Run(s, s + n) for s, n in zip(starts, cuts, strict=True)]
    rng.shuffle(boxes)
    rng.shuffle(runs)
    assert are_whole((sum(cuts), sum(cuts)), boxes)
    assert are_whole((sum(cuts),), runs)
    assert not are_whole((sum(cuts) + 1,), runs)
    assert not are_whole((sum(cuts), sum(cuts)), boxes[1:])


@dataclass
class Item:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


ITEMS = [Item((2, 3)), Item((1, 3)), Item((3,)), Item((12,), torch.uint8)]
GOOD = [
    NamedTensor("a", FLOAT32, (3, 3), ((0, Box((0, 0), (2, 3))), (1, Box((2, 0), (1, 3))))),
    NamedTensor("b", FLOAT32, (6,), ((3, Run(3, 6)), (2, Run(0, 3)))),
]


def test_a_document_says_the_same_again() -> None:
    assert joined.from_json(joined.to_json(GOOD), ITEMS) == tuple(GOOD)


def test_tensors_are_put_together() -> None:
    values = torch.arange(9.0).view(3, 3)
    assert torch.equal(GOOD[0].assembled([values[:2], values[2:]].__getitem__), values)
    flat = torch.arange(6.0)
    assert torch.equal(GOOD[1].assembled({2: flat[:3], 3: flat[3:].view(torch.uint8)}.__getitem__), flat)


@pytest.mark.parametrize(
    "row",
    [
        ["a", "float32", [3, 3], []],
        ["a", "float32", [0], []],
        ["a", "float31", [3, 3], [[0, [0, 0], [2, 3]], [1, [2, 0], [1, 3]]]],
        ["a", ["float32"], [3, 3], [[0, [0, 0], [2, 3]], [1, [2, 0], [1, 3]]]],
        ["a", "float32", [3, 3], [[0, [0, 0], [2, 3]], [0, [2, 0], [1, 3]]]],
        ["a", "float32", [3, 3], [[0, [0, 0], [2, 3]], [9, [2, 0], [1, 3]]]],
        ["a", "float32", [3, 3], [[0, [0, 0], [2, 3]], [1, [1, 0], [1, 3]]]],
        ["a", "float32", [3, 3], [[0, [0, 0], [2, 3]], [1, [2, 1], [1, 3]]]],
        ["a", "float64", [3, 3], [[0, [0, 0], [2, 3]], [1, [2, 0], [1, 3]]]],
        ["a", "float32", [1 << 40, 3], [[0, [0, 0], [1 << 40, 3]]]],
        ["a", "float32", [6], [[2, 0, 3], [3, 3, 9]]],
        ["a", "float32", [6], [[2, 0, 3], [3, [3], [3]]]],
        ["a", "float32", [6], [[2, 3, 0], [3, 0, 6]]],
        ["a", "float32", [6], [[2, -3, 0], [3, 0, 6]]],
        ["a", "float32", [6], [[2, True, 3], [3, 3, 6]]],
        ["a", "float32", [6], [[2, 0], [3, 3, 6]]],
        [5, "float32", [6], [[2, 0, 3], [3, 3, 6]]],
        "row",
        None,
    ],
    ids=str,
)
def test_documents_that_lie_are_refused(row: Any) -> None:
    with pytest.raises(FormatError):
        joined.from_json([row], ITEMS)


def test_no_item_is_in_two_tensors() -> None:
    with pytest.raises(FormatError):
        joined.from_json(joined.to_json([GOOD[0], GOOD[0]]), ITEMS)
    with pytest.raises(FormatError):
        joined.from_json({"a": 1}, ITEMS)
