"""What is finite stays finite, at the ends of every dtype's range, or is refused by name."""

from __future__ import annotations

import pytest
import torch

from statecodec import codecs
from statecodec.codecs import Companded
from statecodec.codecs.changes import subtract_values
from statecodec.errors import UnencodableValues

CODECS = (
    "raw", "split", "split(high=fp16)", "split(low_bits=16)", "cast", "cast(to=fp16)", "cast(to=fp32)", "companded",
    "companded(bits=4)", "companded(curve=linear)", "companded(curve=log)", "companded(curve=sqrt,bits=4)",
    "folded(level=1)", "folded(level=1,inner=companded)", "folded(inner=cast)", "shared(dims=[0])",
    "shared(dims=[1],inner=companded)", "lowrank(rank=1)", "lowrank(rank=1,form=square)",
    "lowrank(rank=1,form=rank_one)", "uniform", "uniform(step=1e-37)", "uniform(step=1e30)", "direction",
    "direction(step=1e-37,eps=1e-37)", "logarithmic", "logarithmic(per_octave=64)",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", CODECS)
@pytest.mark.parametrize("share", [1.0, 0.99999, 0.5, 1e-6])
def test_the_largest_values_stay_finite_or_are_refused(spec: str, dtype: torch.dtype, share: float) -> None:
    codec, largest = codecs.parse(spec), torch.finfo(dtype).max * share
    for x in (torch.full((8, 16), largest, dtype=dtype), torch.rand(8, 16, dtype=torch.float64).mul(largest).to(dtype)):
        for backend in ("reference", "cpu"):
            try:
                given = dict.fromkeys(codec.needs, x)
                decoded = codec.encode(x, backend, given).decode(backend=backend, companions=given)
            except UnencodableValues:
                continue
            assert decoded.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_residual_to_the_largest_value_stays_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x, base = torch.full((4, 128), largest, dtype=dtype), torch.full((4, 128), largest * 0.9, dtype=dtype)
    _, decoded = subtract_values(Companded(), x, base)
    assert decoded.isfinite().all()
