"""The form that codes are narrowed to is about the smallest there is, and half the symbols where that costs nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statecodec.buffers import Pool
from statecodec.format.packing import Packing, _room, _write_narrowed
from statecodec.format.words import words_of
from statecodec.kernels.cpu import forms as cpu
from statecodec.kernels.reference import forms as reference
from statecodec.kernels.reference.narrowing import LOW_BITS, Narrowing


def form_of(codes: Tensor) -> Narrowing | None:
    """Both backends choose the same, at the same cost."""
    found, other = reference.form_of(codes), cpu.form_of(codes)
    if found is None or other is None:
        assert found is other
        return None
    assert other.narrowing == found.narrowing
    assert other.bits == pytest.approx(found.bits)
    return found.narrowing


def sizes(codes: Tensor, cols: int) -> dict[Narrowing, int]:
    """Bytes of every form that takes the codes."""
    pool, found = Pool(), {}
    buffer = pool.take(2 * _room([words_of(codes)], ()))
    for form in (Narrowing(cols, low, nibbles) for low in LOW_BITS for nibbles in (False, True)):
        length = _write_narrowed(codes.view(-1).numpy(), form, buffer, Packing(), pool)
        if length is not None:
            found[form] = length
    return found


def normal(deviation: float, *, tails: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 700, generator=generator) * deviation
    rare = torch.rand(300, 700, generator=generator) < tails
    return (torch.where(rare, 60 * x, x)).round().to(torch.int32)


@pytest.mark.parametrize("tails", [0.0, 0.0003, 0.003])
@pytest.mark.parametrize("deviation", [1.0, 4.0, 11.0, 30.0, 200.0, 4000.0, 9000.0])
def test_it_is_about_the_smallest(deviation: float, tails: float) -> None:
    codes = normal(deviation, tails=tails)
    found, chosen = sizes(codes, 0), form_of(codes)
    assert chosen is not None
    assert found[chosen] <= 1.02 * min(found.values()), (chosen, found)


@pytest.mark.parametrize("deviation", [30.0, 9000.0])
def test_on_a_fine_grid_it_has_nibbles(deviation: float) -> None:
    codes = normal(deviation)
    found, chosen = sizes(codes, 0), form_of(codes)
    assert chosen is not None
    assert chosen.nibbles
    assert found[chosen] <= 1.003 * min(size for form, size in found.items() if not form.nibbles)


def test_log_codes_of_second_moments_lose_their_terms() -> None:
    generator = torch.Generator().manual_seed(1)
    row, column = torch.randn(300, 1, generator=generator) * 40, torch.randn(1, 700, generator=generator) * 40
    codes = (1000 + row + column + 3 * torch.randn(300, 700, generator=generator)).round().to(torch.int16)
    found, chosen = sizes(codes, 700), form_of(codes)
    assert chosen is not None
    assert chosen.cols == 700
    assert found[chosen] <= 1.02 * min(found.values())


def test_codes_that_fill_their_bits_have_no_form() -> None:
    assert form_of(normal(2.0**29)) is None


@pytest.mark.parametrize("shape", [(1, 64), (1, 20_000), (15, 40), (16, 16), (70, 30), (5000, 2)])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("scale", [0, 1, 20, 3000])
def test_any_matrix_has_a_form_that_both_backends_choose(
    scale: float, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(2)
    codes = (torch.randn(shape, generator=generator) * scale + 300).round().to(dtype)
    codes[torch.rand(shape, generator=generator) < 0.1] = 0
    assert form_of(codes) is not None
