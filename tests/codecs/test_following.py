"""Averages as their distance from the weights they follow: off by half a step at most, whatever the weights came to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statecodec import codecs
from statecodec.codecs import Codec
from statecodec.errors import FormatError, UnencodableValues, UnsupportedTensor, UsageError
from tests.contracts.codec import CodecContract, companions, sample


class TestFollowing(CodecContract):
    """A second tensor stands for the weight; where both are 0, so is what comes back."""

    @pytest.fixture(params=["following", "following(step=0.001)", "following(step=1.5e-09)"])
    def codec(self, request: pytest.FixtureRequest) -> Codec:
        return codecs.parse(request.param)

    def test_zeros_decode_to_zeros(self, codec: Codec) -> None:
        """... beside zeros. Codes of 0 stand for the weight."""
        x = torch.zeros(4, 260)
        assert not codec.encode(x, companions={"weight": x}).decode(companions={"weight": x}).any()
        weight = torch.randn(4, 260)
        assert torch.equal(codec.zeros((4, 260), torch.float32).decode(companions={"weight": weight}), weight)


def test_the_bound_is_not_idle() -> None:
    codec = codecs.parse("following(step=0.001)")
    x = sample(codec, (40, 300), torch.float32, seed=3)
    given = companions(codec, x)
    error = (codec.encode(x, companions=given).decode(companions=given).double() - x.double()).abs()
    assert (error / codec.error_bound(x, given)).max() > 0.5


@pytest.mark.parametrize("form", ["raw", "uniform(step=1e-6)", "uniform(step=1e-3)", "cast(to=bf16)"])
def test_the_weights_own_error_does_not_reach_the_average(form: str) -> None:
    """Against float64: the error is uniform over a step. The weight is taken as the reader has it."""
    generator = torch.Generator().manual_seed(0)
    exact = 0.02 * torch.randn(200, 300, generator=generator)
    average = exact + 1e-4 * torch.randn(200, 300, generator=generator)
    weight = codecs.parse(form).encode(exact).decode()
    encoded = codecs.parse("following(step=1e-5)").encode(average, companions={"weight": weight})
    error = (encoded.decode(companions={"weight": weight}).double() - average.double()).numpy()
    assert np.sqrt((error**2).mean()) == pytest.approx(1e-5 / math.sqrt(12), rel=0.01)
    assert abs(error).max() < 0.501e-5
    if form == "raw":
        alone = codecs.parse("uniform(step=1e-5)").encode(average)
        assert entropy(encoded.parts["codes"]) < entropy(alone.parts["codes"]) - 5, "log2 of 0.02 / 1e-4 is 7.6"


def entropy(codes: Tensor) -> float:
    """Bits per code."""
    _, counts = np.unique(codes.numpy(), return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=100)
@given(value=FINITE, weight=FINITE, step=st.floats(2.0**-126, 2.0**100))
def test_any_number_beside_any_other(value: float, weight: float, step: float) -> None:
    codec = codecs.Following(step)
    x, given = torch.tensor([value]), {"weight": torch.tensor([weight])}
    try:
        decoded = codec.encode(x, companions=given).decode(companions=given)
    except UnencodableValues:
        assert abs(value - weight) > 3e38
        return
    assert decoded.isfinite().all()
    assert abs(float(decoded) - value) <= float(codec.error_bound(x, given))


def test_what_cannot_be_is_refused_by_name() -> None:
    x, codec = torch.randn(40, 30), codecs.Following(0.01)
    for spoilt in (math.nan, math.inf):
        lost = x.clone()
        lost[3, 5] = spoilt
        with pytest.raises(UnencodableValues, match="following cannot represent"):
            codec.encode(lost, companions={"weight": x})
        with pytest.raises(UnencodableValues, match="its weight"):
            codec.encode(x, companions={"weight": lost})
    with pytest.raises(UnencodableValues, match="too far"):
        codec.encode(torch.tensor([3e38]), companions={"weight": torch.tensor([-3e38])})
    with pytest.raises(UnsupportedTensor):
        codec.encode(torch.arange(3), companions={"weight": torch.zeros(3)})
    for given_ in ({}, {"weight": x[1:]}, {"master": x}):
        with pytest.raises(UsageError, match="weight"):
            codec.encode(x, companions=given_)


def test_any_parts_decode_to_something() -> None:
    """Foreign files may hold any codes beside any weight; but for NaN all of it is finite."""
    edge = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -0.0, 1e-45])
    for code in (-(2**31), -1, 0, 2**31 - 1):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            parts = {"codes": torch.full((6,), code, dtype=torch.int32)}
            for backend in ("cpu", "reference"):
                encoded = codecs.EncodedTensor(codecs.Following(2.0), (6,), dtype, parts)
                decoded = encoded.decode(backend=backend, companions={"weight": edge})
                assert decoded[[0, 1, 3, 4, 5]].isfinite().all()
    parts = {"codes": torch.zeros(5, dtype=torch.int32)}
    with pytest.raises(FormatError):
        codecs.EncodedTensor(codecs.Following(), (6,), torch.float32, parts)
