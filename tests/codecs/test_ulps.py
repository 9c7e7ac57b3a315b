"""16-bit copies of a tensor that is stored anyhow: they come back bit for bit, at next to no cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statecodec import codecs
from statecodec.errors import FormatError, UnencodableValues, UnsupportedTensor, UsageError

NARROW = [torch.bfloat16, torch.float16]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def master(seed: int = 0, shape: tuple[int, ...] = (40, 300)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("form", ["raw", "uniform(step=1e-7)", "uniform(step=1e-5)", "split", "cast(to=bf16)"])
def test_weights_come_back_bit_for_bit_whatever_the_master_is_stored_as(dtype: torch.dtype, form: str) -> None:
    exact = master()
    weight = exact.to(dtype)
    decoded = codecs.parse(form).encode(exact).decode()
    encoded = codecs.Ulps().encode(weight, companions={"master": decoded})
    assert torch.equal(bits(encoded.decode(companions={"master": decoded})), bits(weight))
    share = encoded.parts["ulps"].count_nonzero() / weight.numel()
    assert share == 0 if form == "raw" else share < (0.3 if dtype == torch.bfloat16 else 1)
    if form == "uniform(step=1e-5)" and dtype == torch.bfloat16:
        assert share > 0.001, "a coarse master crosses rounding boundaries"


def test_masters_that_round_to_nothing_keep_their_weights() -> None:
    """A grid takes small weights to 0, which is thousands of bf16 numbers away."""
    exact = master() ** 5
    decoded = codecs.parse("uniform(step=1e-3)").encode(exact).decode()
    assert not decoded.any()
    weight = exact.bfloat16()
    encoded = codecs.Ulps().encode(weight, companions={"master": decoded})
    assert torch.equal(bits(encoded.decode(companions={"master": decoded})), bits(weight))


@settings(deadline=None, max_examples=40)
@given(
    number=st.integers(-(2**15), 2**15 - 1),
    ulps=st.integers(-300, 300) | st.integers(-(2**16), 2**16),
    dtype=st.sampled_from(NARROW),
)
def test_any_number_from_any_other(number: int, ulps: int, dtype: torch.dtype) -> None:
    """The order of the values is the oracle: -inf to -0.0, 0.0 to inf, as torch sorts them."""
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    everything = everything[~everything.isnan()]
    negative = everything[bits(everything) < 0].sort(descending=False, stable=True).values
    positive = everything[bits(everything) >= 0].sort(stable=True).values
    order = torch.cat([negative, positive])
    start = number % len(order)
    at = min(max(start + ulps, 0), len(order) - 1)
    given = {"master": order[start].to(torch.float32)}
    encoded = codecs.Ulps().encode(order[at], companions=given)
    assert (int(encoded.parts["ulps"]) - (at - start)) % 2**16 == 0
    assert torch.equal(bits(encoded.decode(companions=given)), bits(order[at]))


def test_pieces_concatenate_to_the_whole() -> None:
    wide = master(3)
    weight = (wide + 1e-4 * master(4)).bfloat16()
    whole = codecs.Ulps().encode(weight, companions={"master": wide}).parts["ulps"]
    pieces = [
        codecs.Ulps().encode(w, companions={"master": m}) for w, m in zip(weight.split(7), wide.split(7), strict=True)
    ]
    assert whole.any()
    assert torch.equal(torch.cat([p.parts["ulps"] for p in pieces]), whole)


def test_what_cannot_be_is_refused_by_name() -> None:
    wide = master()
    weight = wide.bfloat16()
    with pytest.raises(UnencodableValues, match="ulps"):
        codecs.Ulps().encode(torch.full_like(weight, torch.nan), companions={"master": wide})
    lost = wide.clone()
    lost[3, 5] = torch.nan
    with pytest.raises(UnencodableValues, match="ulps"):
        codecs.Ulps().encode(weight, companions={"master": lost})
    with pytest.raises(UnsupportedTensor):
        codecs.Ulps().encode(wide, companions={"master": wide})
    for given_ in ({}, {"master": wide[1:]}):
        with pytest.raises(UsageError, match="master"):
            codecs.Ulps().encode(weight, companions=given_)


def test_any_parts_decode_to_something() -> None:
    """Foreign files may hold any ulps beside any master."""
    edge = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -0.0, 1e-45])
    for ulps in (-(2**15), -1, 2**15 - 1):
        for dtype in NARROW:
            parts = {"ulps": torch.full((6,), ulps, dtype=torch.int16)}
            decoded = codecs.EncodedTensor(codecs.Ulps(), (6,), dtype, parts).decode(companions={"master": edge})
            assert decoded.shape == (6,)
    with pytest.raises(FormatError):
        codecs.EncodedTensor(codecs.Ulps(), (6,), torch.bfloat16, {"ulps": torch.zeros(5, dtype=torch.int16)})
