"""Every registered codec, in configurations that vary every field, against the contract; and what some promise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statecodec import codecs
from statecodec.codecs import Codec
from statecodec.dtypes import of
from statecodec.errors import InvalidCodec, UnencodableValues, UnsupportedVersion
from tests.contracts.codec import CodecContract, companions, sample

SPECS = [
    "raw",
    "dropped",
    "uniform",
    "uniform(step=0.001)",
    "uniform(step=1.5e-09)",
    "direction",
    "direction(step=0.0003,eps=1e-20)",
    "logarithmic",
    "logarithmic(per_octave=1)",
    "logarithmic(per_octave=64)",
    "cast(to=bf16)",
    "cast(to=fp16)",
    "cast(to=fp32)",
    "split",
    "split(low_bits=16)",
    "split(high=fp16)",
    "split(high=fp16,low_bits=16)",
    "companded",
    "companded(bits=4,group=32)",
    "companded(bits=4,group=32,rows=last)",
    "companded(curve=log,rows=last)",
    "companded(curve=linear)",
    "companded(curve=linear,bits=4)",
    "companded(curve=sqrt)",
    "companded(curve=sqrt,bits=4,group=16)",
    "companded(curve=log)",
    "companded(curve=log,bits=4)",
    "companded(curve=log,per_octave=15,group=256)",
    "companded(curve=log,per_octave=2,top=31)",
    "folded(level=0)",
    "folded(level=3,rows=last,inner=companded(rows=last,bits=4))",
    "folded(level=2)",
    "folded(level=5,inner=companded(group=32))",
    "shared(dims=0)",
    "shared(dims=[0,1])",
    "shared(dims=1,inner=companded)",
    "lowrank(rank=3)",
    "lowrank(rank=3,rows=last)",
    "lowrank(rank=3,form=square)",
    "lowrank(rank=1,form=rank_one)",
]
ELSEWHERE = ("following", "ulps", "same")  # have a test_NAME.py each: their companions are no second moments


class TestEveryCodec(CodecContract):
    @pytest.fixture(params=SPECS)
    def codec(self, request: pytest.FixtureRequest) -> Codec:
        return codecs.parse(request.param)

    def repeats(self, codec: Codec) -> bool:
        return codec.name not in ("lowrank", "folded", "shared", "cast")


def test_every_codec_and_every_field_is_held_to_the_contract() -> None:
    covered = [codecs.parse(text) for text in SPECS]
    for name in codecs.names():
        if name in ELSEWHERE:
            continue
        made = [codec for codec in covered if codec.name == name]
        assert made, name
        for f in dataclasses.fields(codecs.get(name)):
            assert len({str(getattr(codec, f.name)) for codec in made}) > 1, f"{name}: {f.name} has one value only"


EXACT = (
    "raw",
    "folded(level=0)",
    "cast(to=fp32)",
    "split(low_bits=16)",
    "split(high=fp16,low_bits=16)",
)  # on ordinary fp32 values


@pytest.mark.parametrize("text", [s for s in SPECS if s != "dropped"])
def test_the_bound_is_not_idle(text: str) -> None:
    """A bound that nothing comes near could hide any defect: somewhere the error reaches a good part of it."""
    codec = codecs.parse(text)
    x = sample(codec, (40, 300), torch.float32, seed=3)
    given = companions(codec, x)
    error = (codec.encode(x, companions=given).decode(companions=given).double() - x.double()).abs()
    bound = codec.error_bound(x, given)
    if text in EXACT:
        assert error.max() == 0
    else:
        floor = 0.02 if text.startswith("lowrank(rank=3") else 0.5
        assert (error / bound.clamp(min=1e-300)).max() > floor


@pytest.mark.parametrize("text", [s for s in SPECS if any(word in s for word in ("sqrt", "log", "rank_one"))])
def test_no_positive_second_moment_becomes_zero(text: str) -> None:
    """A second moment that decodes to 0 divides its update by eps (measured: updates of 83 instead of 1)."""
    codec = codecs.parse(text)
    x = torch.rand(64, 512, generator=torch.Generator().manual_seed(1)) ** 8 + 1e-30
    x[:, ::7] = 0
    x[3] = 1e-44  # subnormals are positive too
    decoded = codec.encode(x).decode()
    if "rank_one" in text:
        decoded[3] = 1  # a product of means may underflow; a code never does
    else:
        assert (decoded[x == 0] == 0).all()
    assert (decoded[x > 0] > 0).all()


@pytest.mark.parametrize("text", [s for s in SPECS if s.startswith("companded")])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-8, 1.0, 1e8, 1e30, 3.4e38])
def test_scales_have_the_range_of_fp32(text: str, scale: float) -> None:
    codec = codecs.parse(text)
    x = (torch.rand(3, 200, generator=torch.Generator().manual_seed(5)) * scale).to(torch.float32)
    decoded = codec.encode(x).decode()
    assert decoded.isfinite().all()
    assert ((decoded.double() - x.double()).abs() <= codec.error_bound(x)).all()
    if scale >= 1e-38:
        relative = (decoded.double() - x.double()).norm() / x.double().norm()
        assert relative < (0.2 if codec.bits == 4 or codec.top else 0.02)


def test_negative_zero() -> None:
    x = torch.tensor([-0.0, 1.0])
    for text in ("raw", "split", "split(high=fp16)", "cast"):
        assert torch.signbit(codecs.parse(text).encode(x).decode())[0], text
    for text in ("companded", "companded(curve=log)", "uniform", "logarithmic"):
        assert not torch.signbit(codecs.parse(text).encode(x).decode())[0], text


@settings(max_examples=150)
@given(
    text=st.sampled_from(["split", "split(low_bits=16)", "split(high=fp16)", "split(high=fp16,low_bits=16)"]),
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64),
)
def test_split_of_any_bits(text: str, bits: list[int]) -> None:
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    codec = codecs.parse(text)
    try:
        decoded = codec.encode(x).decode()
    except UnencodableValues:
        assert "fp16" in text
        assert (x[x.isfinite()].abs() >= 65520).any()
        return
    finite = x.isfinite()
    assert torch.equal(decoded.isnan(), x.isnan())
    assert torch.equal(decoded[x.isinf()], x[x.isinf()])
    assert ((decoded[finite].double() - x[finite].double()).abs() <= codec.error_bound(x)[finite]).all()
    assert torch.equal(torch.signbit(decoded[finite]), torch.signbit(x[finite]))
    if text == "split(low_bits=16)":
        assert torch.equal(decoded[finite].view(torch.int32), x[finite].view(torch.int32))


def test_split_high_part_is_the_bf16_parameter() -> None:
    """The high part is torch's own rounding to bf16, except on exact ties, which go away from zero.

    These are 64 of 2**23 mantissas.
    """
    mantissas = torch.arange(1 << 23, dtype=torch.int32) | 0x3F800000
    x = mantissas.view(torch.float32)
    exact = codecs.parse("split(low_bits=16)").encode(x).parts["high"]
    assert int((exact.view(torch.int16) != x.to(torch.bfloat16).view(torch.int16)).sum()) == 64


def test_rows_are_all_dimensions_but_the_first() -> None:
    """A convolution kernel has one scale for 128 values, not for 3; version 1, along the last one, reads."""
    x = sample(codecs.Raw(), (8, 16, 3, 3), torch.float32)
    for text in ("companded", "companded(bits=4,group=32)", "folded(level=2)", "lowrank(rank=2)"):
        codec = codecs.parse(text)
        flat = codec.encode(x.view(8, 144))
        assert all(torch.equal(p.reshape(-1), flat.parts[k].reshape(-1)) for k, p in codec.encode(x).parts.items())
        config = {("steps" if k == "per_octave" else k): v for k, v in codec.config().items() if k != "rows"}
        old = codecs.from_config({**config, "version": 1})
        assert old == dataclasses.replace(codec, rows="last")
        lines = codec.encode(x.view(8 * 16 * 3, 3))
        found = old.encode(x)
        assert old.settled((8, 144)) == codec
        assert old.settled((8, 12, 12)) == old
        assert all(torch.equal(p.reshape(-1), lines.parts[k].reshape(-1)) for k, p in found.parts.items())
        assert torch.equal(found.decode().view(-1), lines.decode().view(-1))
    assert codecs.parse("companded").nbytes(x.shape, of(x.dtype)) < 1.05 * x.numel()
    for wrong in (0, 4, "1", True, None):
        with pytest.raises(UnsupportedVersion):
            codecs.from_config({"name": "companded", "version": wrong})
    with pytest.raises(UnsupportedVersion):  # version 1 had no such field
        codecs.from_config({"name": "companded", "version": 1, "rows": "last"})


def test_codes_per_octave_under_their_old_name_are_read() -> None:
    """Versions of codecs that called them `steps`, in manifests and in the keys of state dicts."""
    for text, old in (
        ("companded(curve=log,per_octave=18)", {"name": "companded", "version": 2, "curve": "log", "steps": 18}),
        (
            "companded(curve=log,per_octave=18,rows=last)",
            {"name": "companded", "version": 1, "curve": "log", "steps": 18},
        ),
        ("logarithmic(per_octave=3)", {"name": "logarithmic", "version": 1, "steps": 3}),
        ("logarithmic", {"name": "logarithmic", "version": 1}),
    ):
        assert codecs.from_config(old) == codecs.parse(text)
        fields = ",".join(f"{k}={v}" for k, v in old.items() if k != "name")
        assert codecs.parse(f"{old['name']}({fields})") == codecs.parse(text)
        with pytest.raises(UnsupportedVersion):
            codecs.from_config({**old, "per_octave": 2})
        with pytest.raises(InvalidCodec):
            codecs.parse(f"{old['name']}(steps=3)")


def test_shared_and_folded_against_numpy() -> None:
    x = sample(codecs.Raw(), (6, 37), torch.float32)
    a = x.double().numpy()
    shared = codecs.parse("shared(dims=0)").encode(x).decode().numpy()
    assert abs(shared - a.mean(0, keepdims=True)).max() < 1e-6
    folded = codecs.parse("folded(level=2)").encode(x).decode().numpy()
    for start in range(0, 37, 4):
        block = a[:, start : start + 4]
        assert abs(folded[:, start : start + 4] - block.mean(1, keepdims=True)).max() < 1e-6


def test_lowrank_is_the_best_of_its_rank() -> None:
    x = sample(codecs.Raw(), (30, 50), torch.float32)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    best = (u[:, :3] * s[:3] @ vh[:3] - x.double()).norm()
    found = (codecs.parse("lowrank(rank=3)").encode(x).decode().double() - x.double()).norm()
    assert found == pytest.approx(float(best), rel=1e-5)


def test_lowrank_of_a_large_matrix_is_near_the_best_and_repeats() -> None:
    generator = torch.Generator().manual_seed(2)
    decay = torch.logspace(0, -3, 60)
    x = (torch.randn(1100, 60, generator=generator) * decay) @ torch.randn(60, 1200, generator=generator)
    codec = codecs.parse("lowrank(rank=8)")
    first, second = codec.encode(x), codec.encode(x)
    assert all(torch.equal(first.parts[k], second.parts[k]) for k in first.parts)
    s = torch.linalg.svdvals(x.double())
    assert float((first.decode().double() - x.double()).norm()) < 1.02 * float(s[8:].norm())
