"""Records of integer codes: whatever they are, they come back, and what is small is stored small."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statecodec import codecs
from statecodec.buffers import Pool
from statecodec.format.packing import NARROWED, PREDICTED, Packing, decode_record, encode_record
from statecodec.kernels import cpu
from statecodec.kernels.reference import forms as reference

INTEGERS = st.sampled_from([torch.int16, torch.int32])


@settings(max_examples=100)
@given(
    dtype=INTEGERS,
    shape=st.sampled_from([(64,), (5000,), (70, 90), (16, 3, 3, 40), (200, 17), (190, 180), (96, 24, 5, 3)]),
    scale=st.floats(0, 20),
    base=st.integers(-5000, 5000),
    outliers=st.integers(0, 30),
    rank=st.integers(0, 5),
    seed=st.integers(0, 5),
)
def test_packing_gives_any_integers_back(
    dtype: torch.dtype, shape: tuple[int, ...], scale: float, base: int, outliers: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2**scale + base
    if rank:
        left, right = (torch.randn(n, rank, generator=generator) for n in (shape[0], x.numel() // shape[0]))
        x += 2**scale * (left @ right.T).view(shape)
    x = x.round().clamp(-(2**31), 2**31 - 129).to(torch.int32)
    x.view(-1)[torch.randint(x.numel(), (outliers,), generator=generator)] = -(2**31) + 5
    x = x.to(dtype)
    least = x.nbytes + 5 * x.element_size()
    for packing in (Packing("zstd", 3), Packing(), Packing("predicted")):
        buffer, length = encode_record([x], packing, Pool())
        out = torch.full_like(x, 9)
        decode_record(buffer[:length].copy(), [out], Pool())
        assert torch.equal(out, x)
        assert length <= least
        if packing.level is None:
            least = length  # a prediction makes nothing larger


def packed(x: torch.Tensor) -> float:
    """Bits per element; the record must be of narrowed codes."""
    buffer, length = encode_record([x], Packing(), Pool())
    assert buffer[0] == NARROWED
    return 8 * length / x.numel()


def test_narrow_codes_take_little_more_than_their_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    for deviation in (0.5, 1.0, 3.0, 30.0, 4000.0, 16000.0):
        x = (torch.randn(512, 512, generator=generator) * deviation).round().to(torch.int32)
        levels = torch.arange(-8 * int(deviation + 1), 8 * int(deviation + 1) + 1, dtype=torch.float64)
        edges = torch.special.ndtr((levels + 0.5) / deviation) - torch.special.ndtr((levels - 0.5) / deviation)
        entropy = float(torch.special.entr(edges).sum()) / 0.6931471805599453
        assert entropy - 0.01 < packed(x) < entropy + 0.2, deviation


def test_terms_are_taken_out_of_second_moments() -> None:
    """A row factor times a column factor costs its noise, however many octaves it spans, and dead units nothing."""
    generator = torch.Generator().manual_seed(1)
    row, column = torch.randn(600, 1, generator=generator) * 9, torch.randn(1, 400, generator=generator) * 3
    v = torch.exp2(row + column + torch.randn(600, 400, generator=generator) * 0.3 - 40)
    codec = codecs.Logarithmic(8)
    alive = packed(codec.encode(v).parts["codes"])
    assert alive < 3.6  # noise of 2.4 codes: 3.3 bits
    v[:, ::7], v[::9] = 0.0, 0.0
    assert packed(codec.encode(v).parts["codes"]) < alive + 0.3


def test_low_bytes_that_pack_make_room_for_the_bits_after_them() -> None:
    """They are narrowed where they would be stored; packed, what follows moves up."""
    x = (torch.randn(200, 300, generator=torch.Generator().manual_seed(2)) * 300).round().to(torch.int32) * 32
    assert reference.form_of(x) is not None
    assert packed(x) < 12
    buffer, length = encode_record([x], Packing(), Pool())
    out = torch.empty_like(x)
    decode_record(buffer[:length].copy(), [out], Pool())
    assert torch.equal(out, x)


def low_rank(rows: int, cols: int, rank: int, deviation: float) -> torch.Tensor:
    """A matrix of that rank, of deviation 30, and noise."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(n, rank, generator=generator) for n in (rows, cols))
    return 30 * (left @ right.T) / max(rank, 1) ** 0.5 + deviation * torch.randn(rows, cols, generator=generator)


def lengths(x: torch.Tensor) -> tuple[int, int, int]:
    """Bytes without and with a prediction, and the method of the second."""
    (_, plain), (buffer, predicted) = (encode_record([x], Packing(way), Pool()) for way in ("zstd", "predicted"))
    return plain, predicted, int(buffer[0])


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_prediction_leaves_the_noise_and_the_factors(rank: int) -> None:
    rows, cols, noise = 400, 300, 6.0
    codes = low_rank(rows, cols, rank, noise).round().to(torch.int32)
    plain, predicted, method = lengths(codes)
    noise_bits = math.log2(noise * math.sqrt(2 * math.pi * math.e))
    factor_bits = math.log2(30 / noise * math.sqrt(cols / rank)) + 2  # as coarse as the noise lets them be
    ideal = noise_bits + rank * (1 / rows + 1 / cols) * factor_bits
    assert method == PREDICTED
    assert 8 * predicted / codes.numel() < ideal + 0.25
    assert predicted < 0.8 * plain


def test_rows_that_nothing_predicts_do_not_speak_for_the_others() -> None:
    """What a prediction saves is told by rows of the whole matrix, not by its first, middle or last ones."""
    codes = low_rank(400, 300, 2, 1.0)
    for start, stop in ((0, 100), (160, 240), (300, 400)):
        codes[start:stop] = torch.randn(stop - start, 300, generator=torch.Generator().manual_seed(start))
    plain, predicted, method = lengths(codes.round().to(torch.int32))
    assert method == PREDICTED
    assert predicted < 0.8 * plain


def test_a_prediction_is_taken_out_beside_row_and_column_terms() -> None:
    """Of second moments, with dead rows and columns."""
    generator = torch.Generator().manual_seed(4)
    row, column = torch.randn(300, 1, generator=generator) * 9, torch.randn(1, 400, generator=generator) * 3
    v = torch.exp2(row + column + low_rank(300, 400, 3, 2.0) / 16 - 40)
    v[:, ::7], v[::9] = 0.0, 0.0
    plain, predicted, method = lengths(codecs.Logarithmic(8).encode(v).parts["codes"])
    assert method == PREDICTED
    assert predicted < 0.75 * plain


@pytest.mark.parametrize("spread", [0.3, 0.6, 1.0])
def test_what_is_folded_promises_gains_that_its_codes_do_not_have(spread: float) -> None:
    """As changes since a base are: their mean is a large component, around which they are as they were."""
    generator = torch.Generator().manual_seed(6)
    row, column = torch.randn(300, 1, generator=generator), torch.randn(1, 300, generator=generator)
    scale = torch.exp(spread * (row + column))
    codes = (30 * scale * torch.randn(300, 300, generator=generator)).abs().round().to(torch.int32)
    assert cpu.factors_of(codes) is not None
    plain, predicted, method = lengths(codes)
    assert method == NARROWED
    assert predicted == plain


@pytest.mark.parametrize("outliers", [0, 20, 2000])
def test_what_has_no_low_rank_is_stored_as_without_a_prediction(outliers: int) -> None:
    codes = low_rank(300, 300, 0, 30.0)
    codes.view(-1)[torch.randperm(codes.numel(), generator=torch.Generator().manual_seed(5))[:outliers]] *= 1000
    plain, predicted, method = lengths(codes.round().to(torch.int32))
    assert method == NARROWED
    assert predicted == plain
