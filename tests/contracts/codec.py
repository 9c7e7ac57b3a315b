"""What every codec must do, held to float64.

Subclass `CodecContract` in a test file and give it a fixture `codec`: one instance, or several by its params.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from statecodec import codecs
from statecodec.codecs import Codec, Dropped
from statecodec.codecs.chunking import chunks
from statecodec.dtypes import FLOAT32, of
from statecodec.errors import UnencodableValues, UnsupportedTensor

SHAPES = [(), (1,), (7,), (0,), (3, 0), (0, 5), (1, 1), (3, 5), (5, 127), (4, 300), (2, 3, 4, 65)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def signed(codec: Codec) -> bool:
    """Whether the codec takes negative values; those for second moments do not."""
    x = torch.full((4, 4), -1.0)
    try:
        codec.encode(x, companions=dict.fromkeys(codec.needs, x.abs()))
    except UnencodableValues:
        return False
    return True


def sample(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Heavy-tailed values with exact zeros and whole zero rows, as moments have.

    They are not negative where the codec needs that.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.randn(shape, generator=generator).exp()
    x = torch.where(torch.rand(shape, generator=generator) < 0.1, torch.zeros_like(x), x)
    if len(shape) > 1 and shape[0] > 2:
        x[1] = 0.0
    return (x if signed(codec) else x.abs()).to(dtype)


def bits(x: Tensor) -> Tensor:
    """A tensor's bytes."""
    return x.contiguous().view(-1).view(torch.uint8)


def companions(codec: Codec, x: Tensor) -> dict[str, Tensor]:
    """Values for the roles that a codec needs, as of second moments, of x's shape and dtype: some are 0 where x is."""
    generator = torch.Generator().manual_seed(11)
    v = torch.rand(x.shape, generator=generator, dtype=torch.float64) ** 4 + 1e-6
    return {role: torch.where(x == 0, torch.zeros_like(v), v).to(x.dtype) for role in codec.needs}


def takes(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the codec has parts for such a tensor."""
    try:
        codec.parts(shape, of(dtype))
    except UnsupportedTensor:
        return False
    return True


class CodecContract:
    """The tests. `repeats`: encoding what was decoded moves nothing, as the codec's grid is fixed."""

    def repeats(self, codec: Codec) -> bool:
        return True

    @pytest.fixture
    def codec(self) -> Codec:
        raise NotImplementedError

    def test_it_is_its_config(self, codec: Codec) -> None:
        assert codecs.parse(codecs.format_codec(codec)) == codec
        assert codecs.from_config(json.loads(json.dumps(codec.config()))) == codec
        assert hash(codecs.from_config(codec.config())) == hash(codec)

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
    def test_what_comes_back_is_within_the_bound(self, codec: Codec, dtype: torch.dtype) -> None:
        """... from parts as they were stated, on every backend alike."""
        taken = [shape for shape in SHAPES if takes(codec, shape, dtype)]
        assert len(taken) >= 2
        for shape in taken:
            x = sample(codec, shape, dtype)
            given = companions(codec, x)
            encoded = codec.encode(x, companions=given)
            stated = {k: (s.shape, s.dtype) for k, s in codec.parts(shape, of(dtype)).items()}
            assert {k: (tuple(p.shape), of(p.dtype)) for k, p in encoded.parts.items()} == stated
            assert encoded.nbytes == codec.nbytes(shape, of(dtype)) == sum(p.nbytes for p in encoded.parts.values())
            spec = codec.encode(x, "reference", given)
            assert all(torch.equal(bits(part), bits(spec.parts[name])) for name, part in encoded.parts.items())
            decoded = encoded.decode(companions=given)
            assert torch.equal(bits(decoded), bits(spec.decode(backend="reference", companions=given)))
            assert (decoded.shape, decoded.dtype) == (x.shape, dtype)
            error = (decoded.to(torch.float64) - x.to(torch.float64)).abs()
            bound = codec.error_bound(x, given)
            assert (error <= bound).all(), (shape, (error - bound).max())
            if self.repeats(codec):
                again = codec.encode(decoded, companions=given).decode(companions=given)
                assert torch.equal(again, decoded), f"{shape}: encoding a decoded tensor moved it"

    def test_zeros_decode_to_zeros(self, codec: Codec) -> None:
        x = torch.zeros(4, 260)
        for v in (0.0, 1.0):
            given = {role: torch.full_like(x, v) for role in codec.needs}
            assert not codec.encode(x, companions=given).decode(companions=given).any()
            assert not codec.zeros((4, 260), torch.float32).decode(companions=given).any()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
    def test_values_are_kept_or_refused_by_name(self, codec: Codec, value: float) -> None:
        x = sample(codec, (5, 300), torch.float32)
        x[2, 150] = value
        given = {role: torch.ones_like(x) for role in codec.needs}
        try:
            decoded = codec.encode(x, companions=given).decode(companions=given)
        except UnencodableValues as error:
            inner = getattr(codec, "inner", codec)
            assert codec.name in str(error) or inner.name in str(error)  # noqa: PT017
            return
        if not isinstance(codec, Dropped) and not math.isfinite(value):
            assert decoded[2, 150] == value or (math.isnan(value) and decoded[2, 150].isnan())

    def test_non_contiguous_input(self, codec: Codec) -> None:
        x = sample(codec, (48, 40), torch.float32)
        for view in (x.t(), x[:, ::3], x[::2, 5:]):
            given = companions(codec, view)
            copied = codec.encode(view.clone(memory_format=torch.contiguous_format), companions=given)
            for name, part in codec.encode(view, companions=given).parts.items():
                assert torch.equal(part.view(torch.uint8), copied.parts[name].view(torch.uint8))

    @settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        shape=st.tuples(st.integers(1, 9), st.integers(1, 900)) | st.tuples(*[st.integers(1, 9)] * 4),
        target=st.integers(1, 3000),
        seed=st.integers(0, 9),
    )
    def test_pieces_concatenate_to_the_whole(
        self, codec: Codec, shape: tuple[int, ...], target: int, seed: int
    ) -> None:
        if not takes(codec, shape, torch.float32) or codec.align(shape) is None:
            return
        x = sample(codec, shape, torch.float32, seed)
        given = companions(codec, x)
        whole, pieces = codec.encode(x, companions=given), chunks(codec, shape, FLOAT32, target)
        assert pieces[0].start == 0
        assert [a.stop for a in pieces[:-1]] == [b.start for b in pieces[1:]]
        joined: dict[str, list[Tensor]] = {name: [] for name in whole.parts}
        for piece in pieces:
            own = {role: v.view(-1)[piece.start : piece.stop] for role, v in given.items()}
            part = codec.encode(x.view(-1)[piece.start : piece.stop].view(piece.shape), companions=own)
            for name, tensor in part.parts.items():
                joined[name].append(bits(tensor))
        for name, tensor in whole.parts.items():
            assert torch.equal(torch.cat(joined[name]), bits(tensor))
