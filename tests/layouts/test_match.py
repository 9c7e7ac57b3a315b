"""Dealing weights to groups: against brute force over all ways."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from statecodec.layouts.facts.match import deal, deal_by_shape

SHAPES = [(2,), (3,), (2, 3)]


def brute(weights: list[tuple[int, ...]], groups: list[list[tuple[int, ...] | None]]) -> list[list[list[int]]]:
    """All ways to deal, by trying every one."""
    if not weights:
        return [[[] for _ in groups]] if not any(groups) else []
    index, shape, rest = len(weights) - 1, weights[-1], weights[:-1]
    ways = brute(rest, groups)
    for g, group in enumerate(groups):
        if group and group[-1] in (None, shape):
            shorter = [list(x) if i != g else list(x[:-1]) for i, x in enumerate(groups)]
            ways += [[x if i != g else [*x, index] for i, x in enumerate(way)] for way in brute(rest, shorter)]
    return ways


@given(
    st.lists(st.sampled_from(SHAPES), max_size=6),
    st.lists(st.lists(st.sampled_from([*SHAPES, None]), max_size=3), min_size=1, max_size=2),
)
def test_exactly_one_way_or_none(weights: list[tuple[int, ...]], groups: list[list[tuple[int, ...] | None]]) -> None:
    ways = brute(weights, groups)
    assert deal(weights, groups) == (ways[0] if len(ways) == 1 else None)


def test_repeated_layers_in_numeric_order() -> None:
    weights = [(f"h.{i}.fc.weight", (4, 8)) for i in sorted(range(12), key=str)]
    groups = [[(4, 8)] * 12]
    found = deal_by_shape(weights, groups, layers=True)
    assert [weights[found[0, i]][0] for i in range(12)] == [f"h.{i}.fc.weight" for i in range(12)]


def test_two_kinds_of_one_shape_stay_open() -> None:
    weights = [("h.0.k", (4, 4)), ("h.0.q", (4, 4)), ("out", (9,))]
    assert deal_by_shape(weights, [[(4, 4), (4, 4), (9,)]], layers=True) == {(0, 2): 2}
    assert deal_by_shape(weights, [[(4, 4), None, (9,)]], layers=True) == {}


def test_large_ambiguous_inputs_give_up_quickly() -> None:
    assert deal([(4, 4)] * 4000, [[(4, 4)] * 1000, [(4, 4)] * 1000]) is None


def test_layers_out_of_order_are_not_named() -> None:
    """The second shape shows that the optimizer does not go layer by layer."""
    weights = [(f"h.{i}.{kind}", (4, 8) if kind == "up" else (8, 4)) for i in range(3) for kind in ("up", "down")]
    straight = [[(4, 8), (8, 4)] * 3]
    crooked = [[(4, 8), (4, 8), (8, 4), (4, 8), (8, 4), (8, 4)]]
    assert len(deal_by_shape(weights, straight, layers=True)) == 6
    assert deal_by_shape(weights, crooked, layers=True) == {}
    assert deal_by_shape(weights, straight, layers=False) == {}
