"""What every codec promises, for every codec x dtype x shape: the contract of codecs/base.py, held to a float64
oracle.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statecodec import codecs
from statecodec.codecs.chunking import chunks
from statecodec.errors import UnencodableValues, UnsupportedTensor, UnsupportedVersion

SPECS = [
    "raw",
    "dropped",
    "uniform",
    "uniform(step=0.001)",
    "uniform(step=1.5e-09)",
    "direction",
    "direction(step=0.0003,eps=1e-20)",
    "logarithmic",
    "logarithmic(steps=1)",
    "logarithmic(steps=64)",
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
    "companded(curve=log,steps=15,group=256)",
    "companded(curve=log,steps=2,top=31)",
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
NON_NEGATIVE = ("sqrt", "log", "square", "rank_one")
BASED = ("delta", "residual")  # need a base: tests/analysis/test_chain.py
SHAPES = [(), (1,), (7,), (0,), (3, 0), (0, 5), (1, 1), (3, 5), (5, 127), (4, 300), (2, 3, 4, 65)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def sample(text: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed values with exact zeros and whole zero rows, as moments have; non-negative where the codec needs
    it.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.randn(shape, generator=generator).exp()
    x = torch.where(torch.rand(shape, generator=generator) < 0.1, torch.zeros_like(x), x)
    if len(shape) > 1 and shape[0] > 2:
        x[1] = 0.0
    return (x.abs() if any(word in text for word in NON_NEGATIVE) else x).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def companions(codec: codecs.Codec, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values for the roles that a codec needs, as of second moments, of x's shape and dtype: some are 0 where x is."""
    generator = torch.Generator().manual_seed(11)
    v = torch.rand(x.shape, generator=generator, dtype=torch.float64) ** 4 + 1e-6
    return {role: torch.where(x == 0, torch.zeros_like(v), v).to(x.dtype) for role in codec.needs}


def test_every_codec_and_every_field_is_held_to_the_contract() -> None:
    covered = [codecs.parse(text) for text in SPECS]
    for name in codecs.names():
        if name in BASED:
            continue
        made = [codec for codec in covered if codec.name == name]
        assert made, name
        for f in dataclasses.fields(codecs.get(name)):
            assert len({str(getattr(codec, f.name)) for codec in made}) > 1, f"{name}: {f.name} has one value only"


def takes(codec: codecs.Codec, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    try:
        codec.parts(shape, dtype)
    except UnsupportedTensor:
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("text", SPECS)
def test_encoding_keeps_the_contract(text: str, dtype: torch.dtype) -> None:
    codec = codecs.parse(text)
    assert codecs.parse(codecs.format_codec(codec)) == codec
    assert codecs.from_config(json.loads(json.dumps(codec.config()))) == codec
    for shape in SHAPES:
        if not takes(codec, shape, dtype):
            assert text.startswith("shared")
            assert len(shape) <= max(codec.dims)
            continue
        x = sample(text, shape, dtype)
        given = companions(codec, x)
        encoded = codec.encode(x, given=given)
        assert {k: (tuple(p.shape), p.dtype) for k, p in encoded.parts.items()} == {
            k: (s.shape, s.dtype) for k, s in codec.parts(shape, dtype).items()
        }
        assert (
            encoded.nbytes
            == codec.nbytes(shape, dtype)
            == sum(p.numel() * p.element_size() for p in encoded.parts.values())
        )
        spec = codec.encode(x, "reference", given)
        assert all(torch.equal(bits(part), bits(spec.parts[name])) for name, part in encoded.parts.items())
        decoded = encoded.decode(given=given)
        assert torch.equal(bits(decoded), bits(spec.decode(backend="reference", given=given)))
        assert decoded.shape == x.shape
        assert decoded.dtype == dtype
        error = (decoded.to(torch.float64) - x.to(torch.float64)).abs()
        bound = codec.error_bound(x, given)
        assert (error <= bound).all(), (shape, (error - bound).max())
        again = (
            codec.encode(decoded, given=given).decode(given=given)
            if not text.startswith(("lowrank", "folded", "shared", "cast"))
            else decoded
        )
        assert torch.equal(again, decoded), f"{shape}: encoding a decoded tensor moved it"


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
    x = sample(text, (40, 300), torch.float32, seed=3)
    given = companions(codec, x)
    error = (codec.encode(x, given=given).decode(given=given).double() - x.double()).abs()
    bound = codec.error_bound(x, given)
    if text in EXACT:
        assert error.max() == 0
    else:
        floor = 0.02 if text.startswith("lowrank(rank=3") else 0.5
        assert (error / bound.clamp(min=1e-300)).max() > floor


@pytest.mark.parametrize("text", SPECS)
def test_zeros_decode_to_zeros(text: str) -> None:
    codec = codecs.parse(text)
    x = torch.zeros(4, 260)
    for v in (0.0, 1.0):
        given = {role: torch.full_like(x, v) for role in codec.needs}
        assert not codec.encode(x, given=given).decode(given=given).any()
        assert not codec.zeros((4, 260), torch.float32).decode(given=given).any()


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


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_values_are_kept_or_refused_by_name(text: str, value: float) -> None:
    codec = codecs.parse(text)
    x = sample(text, (5, 300), torch.float32)
    x[2, 150] = value
    refusals = []
    try:
        given = {role: torch.ones_like(x) for role in codec.needs}
        decoded = codec.encode(x, given=given).decode(given=given)
    except UnencodableValues as error:
        refusals.append(str(error))
    if refusals:
        assert codec.name in refusals[0] or "companded" in refusals[0]
        return
    if text == "dropped" or (value == -1.0 and not any(w in text for w in NON_NEGATIVE)):
        return
    if math.isnan(value):
        assert decoded[2, 150].isnan()
    else:
        assert decoded[2, 150] == value


def test_negative_zero() -> None:
    x = torch.tensor([-0.0, 1.0])
    for text in ("raw", "split", "split(high=fp16)", "cast"):
        assert torch.signbit(codecs.parse(text).encode(x).decode())[0], text
    for text in ("companded", "companded(curve=log)", "uniform", "logarithmic"):
        assert not torch.signbit(codecs.parse(text).encode(x).decode())[0], text


@pytest.mark.parametrize("text", SPECS)
def test_non_contiguous_input(text: str) -> None:
    codec = codecs.parse(text)
    x = sample(text, (48, 40), torch.float32)
    for view in (x.t(), x[:, ::3], x[::2, 5:]):
        given = companions(codec, view)
        copied = codec.encode(view.clone(memory_format=torch.contiguous_format), given=given)
        for name, part in codec.encode(view, given=given).parts.items():
            assert torch.equal(part.view(torch.uint8), copied.parts[name].view(torch.uint8))


@settings(deadline=None, max_examples=60)
@given(
    text=st.sampled_from([s for s in SPECS if codecs.parse(s).align((9, 9)) is not None]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 900)) | st.tuples(*[st.integers(1, 9)] * 4),
    target=st.integers(1, 3000),
    seed=st.integers(0, 9),
)
def test_pieces_concatenate_to_the_whole(text: str, shape: tuple[int, ...], target: int, seed: int) -> None:
    codec = codecs.parse(text)
    x = sample(text, shape, torch.float32, seed)
    given = companions(codec, x)
    whole = codec.encode(x, given=given)
    pieces = chunks(codec, shape, torch.float32, target)
    assert pieces[0].start == 0
    assert [a.stop for a in pieces[:-1]] == [b.start for b in pieces[1:]]
    joined: dict[str, list[bytes]] = {name: [] for name in whole.parts}
    for piece in pieces:
        own = {role: v.view(-1)[piece.start : piece.stop] for role, v in given.items()}
        part = codec.encode(x.view(-1)[piece.start : piece.stop].view(piece.shape), given=own)
        for name, tensor in part.parts.items():
            joined[name].append(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name, tensor in whole.parts.items():
        assert b"".join(joined[name]) == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@settings(deadline=None, max_examples=150)
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
    """The high part is torch's own rounding to bf16, except on exact ties (64 of 2**23 mantissas), which go away from
    zero.
    """
    mantissas = torch.arange(1 << 23, dtype=torch.int32) | 0x3F800000
    x = mantissas.view(torch.float32)
    exact = codecs.parse("split(low_bits=16)").encode(x).parts["high"]
    assert int((exact.view(torch.int16) != x.to(torch.bfloat16).view(torch.int16)).sum()) == 64


def test_rows_are_all_dimensions_but_the_first() -> None:
    """A convolution kernel has one scale for 128 values, not for 3; version 1, along the last one, reads."""
    x = sample("", (8, 16, 3, 3), torch.float32)
    for text in ("companded", "companded(bits=4,group=32)", "folded(level=2)", "lowrank(rank=2)"):
        codec = codecs.parse(text)
        flat = codec.encode(x.view(8, 144))
        assert all(torch.equal(p.reshape(-1), flat.parts[k].reshape(-1)) for k, p in codec.encode(x).parts.items())
        config = {k: v for k, v in codec.config().items() if k != "rows"}
        old = codecs.from_config({**config, "version": 1})
        assert old == dataclasses.replace(codec, rows="last")
        lines = codec.encode(x.view(8 * 16 * 3, 3))
        found = old.encode(x)
        assert old.settled((8, 144)) == codec
        assert old.settled((8, 12, 12)) == old
        assert codecs.Delta(old).settled((7,)) == codecs.Delta(codec) if "companded" in text else True
        assert all(torch.equal(p.reshape(-1), lines.parts[k].reshape(-1)) for k, p in found.parts.items())
        assert torch.equal(found.decode().view(-1), lines.decode().view(-1))
    assert codecs.parse("companded").nbytes(x.shape, x.dtype) < 1.05 * x.numel()
    for wrong in (0, 3, "1", True, None):
        with pytest.raises(UnsupportedVersion):
            codecs.from_config({"name": "companded", "version": wrong})
    with pytest.raises(UnsupportedVersion):  # version 1 had no such field
        codecs.from_config({"name": "companded", "version": 1, "rows": "last"})


def test_shared_and_folded_against_numpy() -> None:
    x = sample("", (6, 37), torch.float32)
    a = x.double().numpy()
    shared = codecs.parse("shared(dims=0)").encode(x).decode().numpy()
    assert abs(shared - a.mean(0, keepdims=True)).max() < 1e-6
    folded = codecs.parse("folded(level=2)").encode(x).decode().numpy()
    for start in range(0, 37, 4):
        block = a[:, start : start + 4]
        assert abs(folded[:, start : start + 4] - block.mean(1, keepdims=True)).max() < 1e-6


def test_lowrank_is_the_best_of_its_rank() -> None:
    x = sample("", (30, 50), torch.float32)
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
