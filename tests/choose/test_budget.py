"""The allocation against trying everything."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statecodec import codecs
from statecodec.choose.budget import Allocator, Option, candidates, hull

RAW = codecs.Raw()
OPTIONS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=6)


def options(pairs: list[tuple[int, int]]) -> list[Option]:
    return [Option(RAW, float(nbytes), float(error)) for nbytes, error in pairs]


@given(OPTIONS)
def test_hull_is_convex_and_below_every_option(pairs: list[tuple[int, int]]) -> None:
    points = hull(options(pairs))
    assert points[0].error == min(e for _, e in pairs)
    assert points[-1].nbytes == min(n for n, _ in pairs)
    slopes = [(b.error - a.error) / (a.nbytes - b.nbytes) for a, b in itertools.pairwise(points)]
    assert slopes == sorted(slopes)
    assert all(s > 0 for s in slopes)
    for nbytes, error in pairs:  # nothing lies left below of it
        for a, b in itertools.pairwise(points):
            if b.nbytes <= nbytes <= a.nbytes:
                line = a.error + (b.error - a.error) * (a.nbytes - nbytes) / (a.nbytes - b.nbytes)
                assert error >= line - 1e-9


@settings(deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=3), st.integers(0, 150))
def test_allocation_keeps_the_limit_and_is_close_to_the_best(groups: list[list[tuple[int, int]]], limit: int) -> None:
    tensors = {f"t{i}": options(pairs) for i, pairs in enumerate(groups)}
    allocator = Allocator(tensors)
    found = allocator.within(limit)
    combinations = list(itertools.product(*tensors.values()))
    feasible = [c for c in combinations if sum(o.error for o in c) <= limit]
    if not feasible:
        assert found.error == min(sum(o.error for o in c) for c in combinations)
        return
    assert found.error <= limit
    best = min(sum(o.nbytes for o in c) for c in feasible)
    # A Lagrangian allocation is exact on the hull: it misses the best by less than one step of one tensor.
    steps = [a.nbytes - b.nbytes for group in allocator.hulls.values() for a, b in itertools.pairwise(group)]
    assert best <= found.nbytes <= best + max(steps, default=0)


@given(st.lists(OPTIONS, min_size=1, max_size=4))
def test_curve_points_are_allocations(groups: list[list[tuple[int, int]]]) -> None:
    allocator = Allocator({f"t{i}": options(pairs) for i, pairs in enumerate(groups)})
    for nbytes, error in allocator.curve():
        found = allocator.within(error)
        assert found.nbytes <= nbytes + 1e-9


def test_options_without_a_finite_error_are_not_taken() -> None:
    assert hull([Option(RAW, 10, 0.0), Option(RAW, 1, math.inf)]) == [Option(RAW, 10, 0.0)]


@pytest.mark.parametrize("role", ["exp_avg", "exp_avg_sq", "weight"])
def test_candidates_are_codecs_for_the_role(role: str) -> None:
    found = candidates(role, 2)
    assert len(found) == len(set(found)) > 10
    signed = {c.signed for c in found if isinstance(c, codecs.Companded)}
    assert signed == ({False} if role == "exp_avg_sq" else {True})
    assert not any(isinstance(c, codecs.Based | codecs.Dropped) for c in found)
    based = candidates(role, 2, based=True)
    assert any(isinstance(c, codecs.Residual) for c in based) == (role == "weight")
    shared = {c.dims for c in candidates("exp_avg_sq", 3) if isinstance(c, codecs.Shared)}
    assert len(shared) == 7
