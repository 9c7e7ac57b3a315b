"""SNR against a plain numpy computation of the formula, slice by slice, and its edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statecodec.choose import snr as module
from statecodec.choose.snr import LayerSNR, Measurement, average, choose, cutoffs, kept, saved, snr, subsets
from statecodec.errors import UsageError


def oracle(v: np.ndarray, dims: tuple[int, ...]) -> float:
    """The definition, one slice at a time, in float64."""
    rest = [d for d in range(v.ndim) if d not in dims]
    ratios = []
    for index in itertools.product(*(range(v.shape[d]) for d in rest)):
        at: list[object] = [slice(None)] * v.ndim
        for d, i in zip(rest, index, strict=True):
            at[d] = i
        values = v[tuple(at)].astype(np.float64).ravel()  # type: ignore[index]
        mean = values.sum() / values.size
        variance = ((values - mean) ** 2).sum() / values.size
        if mean > 0:
            ratios.append(mean * mean / variance if variance else math.inf)
    return sum(ratios) / len(ratios) if ratios else math.nan


@settings(max_examples=60)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 2**32 - 1), st.integers(-30, 10))
def test_every_subset_matches_the_definition(shape: list[int], seed: int, exponent: int) -> None:
    v = np.random.default_rng(seed).chisquare(1.0, shape).astype(np.float32) * np.float32(10.0**exponent)
    found = snr(torch.from_numpy(v))
    assert list(found) == subsets(len(shape))
    for dims, ratio in found.items():
        assert ratio == pytest.approx(oracle(v, dims), rel=1e-9), dims


def test_streaming_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    v = torch.rand(37, 5, 11) ** 4
    whole = snr(v)
    monkeypatch.setattr(module, "_SLAB", 200)
    assert len(list(module.slabs(v.shape))) > 5
    for dims, ratio in snr(v).items():
        assert ratio == pytest.approx(whole[dims], rel=1e-12)


def test_a_constant_slice_is_infinite() -> None:
    v = torch.rand(4, 6)
    v[2] = 0.1
    assert snr(v)[(1,)] == math.inf
    assert math.isfinite(snr(v)[(0,)])
    assert set(snr(torch.full((3, 5), 0.3)).values()) == {math.inf}


def test_slices_without_signal_are_skipped() -> None:
    v = torch.rand(50, 20) + 0.5
    padded = torch.cat([v, torch.zeros(30, 20)])
    assert snr(padded)[(1,)] == pytest.approx(snr(v)[(1,)], rel=1e-12)
    # Rows of tokens not seen for long decay until fp32 cannot go on: all stop at one subnormal value.
    decayed = torch.cat([v, torch.full((30, 20), 1.4e-44)])
    assert snr(decayed)[(1,)] == pytest.approx(snr(v)[(1,)], rel=1e-12)
    assert all(math.isnan(r) for r in snr(torch.zeros(4, 4)).values())


def test_tiny_values_do_not_underflow() -> None:
    v = torch.rand(8, 8) + 0.1
    for dims, ratio in snr(v * 1e-30).items():  # the square is below fp32's range
        assert ratio == pytest.approx(snr(v)[dims], rel=1e-5)


def test_shapes_that_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="1 to 6 dimensions"):
        Measurement(())
    with pytest.raises(UsageError, match="1 to 6 dimensions"):
        Measurement((1,) * 7)


def test_average_leaves_out_what_had_no_signal() -> None:
    assert average([{(0,): 2.0}, {(0,): math.nan}, {(0,): 4.0}]) == {(0,): 3.0}
    assert average([{(0,): 2.0}, {(0,): math.inf}]) == {(0,): math.inf}


def test_choice_is_strict_and_saves_most_among_equals() -> None:
    shape = (4, 8)
    assert choose({(0,): 1.0, (1,): 0.5}, shape) == ()
    assert choose({(0,): 1.0 + 1e-9, (1,): 0.5}, shape) == (0,)
    assert choose({(0,): 2.0, (1,): 3.0, (0, 1): 1.5}, shape) == (1,)
    assert choose({(0,): math.inf, (1,): math.inf, (0, 1): math.inf}, shape) == (0, 1)
    assert choose({(0,): math.nan}, shape) == ()


def test_saved_counts_vectors_as_kept() -> None:
    layers = [LayerSNR("a.weight", (10, 10), {(0,): 2.0}), LayerSNR("a.bias", (10,), {(0,): 9.0}, shareable=False)]
    assert saved(layers, {x.name: x.dims() for x in layers}) == pytest.approx(1 - 20 / 110)
    assert saved(layers, {}) == 0.0
    assert cutoffs(layers) == [0.0, 2.0]
    assert kept((3, 4, 5), (0, 2)) == 4
    assert kept((3, 0), (1,)) == 0
