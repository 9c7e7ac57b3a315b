"""Narrowed codes: both backends write the same bytes, and they widen to the codes again, whatever the codes are."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statecodec.kernels.cpu import narrowing as cpu
from statecodec.kernels.reference import narrowing as reference
from statecodec.kernels.reference.narrowing import LOW_BITS, Narrowing

BACKENDS = (reference, cpu)
DTYPES = {1: torch.uint8, 2: torch.int16}  # of parts, by the bytes of an element


def normal(n: int, scale: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rounded normal numbers."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale
    return x.round().to(dtype)


def product(rows: int, cols: int, zeros: float = 0.0) -> Tensor:
    """Log codes of a row factor times a column factor, with noise, some of them 0."""
    generator = torch.Generator().manual_seed(1)
    row, col = torch.randn(rows, 1, generator=generator) * 40, torch.randn(1, cols, generator=generator) * 40
    x = (1000 + row + col + 3 * torch.randn(rows, cols, generator=generator)).round().to(torch.int16)
    x[torch.rand(rows, cols, generator=generator) < zeros] = 0
    return x


def narrow(
    backend: ModuleType, codes: Tensor, form: Narrowing, room: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """(parts, exceptions); the exceptions are None where the form does not fit."""
    parts = {name: torch.full((n,), 85, dtype=DTYPES[size]) for name, (size, n) in form.sizes(len(codes)).items()}
    exceptions = torch.full((len(codes) if room is None else room,), 85, dtype=codes.dtype)
    count = backend.narrow(codes.reshape(-1), form, parts, exceptions)
    return parts, exceptions[:count] if count >= 0 else None  # type: ignore[return-value]


def widened(
    backend: ModuleType, parts: Mapping[str, Tensor], exceptions: Tensor, form: Narrowing, like: Tensor
) -> Tensor:
    out = torch.full_like(like.reshape(-1), 77)
    assert backend.widen(parts, exceptions, form, out)
    return out


def check(codes: Tensor, form: Narrowing) -> tuple[dict[str, Tensor], Tensor]:
    """Both backends alike and reversible; returns what they made."""
    flat = codes.reshape(-1)
    made, exceptions = narrow(reference, flat, form)
    other, others = narrow(cpu, flat, form)
    if exceptions is None:
        assert others is None
        return made, exceptions
    assert torch.equal(exceptions, others)
    assert all(torch.equal(made[name], other[name]) for name in made)
    for backend in BACKENDS:
        assert torch.equal(widened(backend, made, exceptions, form, flat), flat)
    return made, exceptions


@pytest.mark.parametrize("n", [1, 2, 3, 7, 4095, 4096, 4097, 20_001])
@pytest.mark.parametrize("low", LOW_BITS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_codes_come_back(dtype: torch.dtype, low: int, n: int) -> None:
    codes = normal(n, 60 * 2**low if dtype == torch.int32 else 8000, dtype)
    for value, at in ((torch.iinfo(dtype).min, 0), (torch.iinfo(dtype).max, n // 2), (-1, n - 1)):
        codes[at] = value
    for nibbles in (False, True):
        check(codes, Narrowing(low=low, nibbles=nibbles))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 300), (64, 33), (65, 200), (200, 17), (130, 5001)])
@pytest.mark.parametrize("nibbles", [False, True])
def test_centred_codes_come_back(rows: int, cols: int, nibbles: bool) -> None:
    for zeros in (0.0, 0.3, 1.0):
        codes = product(rows, cols, zeros)
        for low in (0, 2):
            parts, _ = check(codes, Narrowing(cols=cols, low=low, nibbles=nibbles))
            if not low and not nibbles:
                assert int((parts["symbols"] == 0).sum()) == int((codes == 0).sum()), "zeros are apart"


def test_dead_rows_and_columns_cost_nothing() -> None:
    """A column that is dead in a block, and dead rows, leave the others' terms alone."""
    codes = product(256, 64)
    alive, _ = check(codes, Narrowing(cols=64))
    codes[70:90], codes[:, 7], codes[64:128, 9] = 0, 0, 0
    dead, exceptions = check(codes, Narrowing(cols=64))
    assert not len(exceptions)
    there = codes.reshape(-1) != 0
    assert (dead["symbols"][there].float() - alive["symbols"][there].float()).abs().mean() < 0.5


def test_columns_are_centred_on_sixty_four_rows() -> None:
    """Terms that drift down the rows are followed: residuals stay near 0."""
    drift = torch.arange(640)[:, None] * torch.linspace(-1, 1, 96)[None, :]
    codes = (product(640, 96) + drift.round()).to(torch.int16)
    parts, exceptions = check(codes, Narrowing(cols=96))
    assert not len(exceptions)
    assert parts["symbols"].float().mean() < 60


@settings(max_examples=200)
@given(
    values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=60),
    dtype=st.sampled_from([torch.int16, torch.int32]),
    low=st.sampled_from(LOW_BITS),
    nibbles=st.booleans(),
    cols=st.integers(0, 9),
)
def test_any_codes(values: list[int], dtype: torch.dtype, low: int, nibbles: bool, cols: int) -> None:
    codes = torch.tensor(values).to(torch.int32).to(dtype)
    if dtype == torch.int32 or not cols or len(codes) % cols:
        cols = 0
    check(codes, Narrowing(cols, low, nibbles))


def test_a_residual_that_does_not_fit_is_refused() -> None:
    """Terms near 0 leave -32768 as it is, and its number would be 2**16."""
    codes = torch.ones(4, 70_000, dtype=torch.int16)
    codes[:, ::2], codes[1::2] = -1, -codes[1::2]
    codes[:, 0] = torch.tensor([-32768, 32767, 1, 0])
    for backend in BACKENDS:
        assert narrow(backend, codes.reshape(-1), Narrowing(cols=70_000))[1] is None
    codes[0, 0] = -32767
    check(codes, Narrowing(cols=70_000))


def test_too_many_exceptions_are_refused() -> None:
    codes = torch.full((100,), 1000, dtype=torch.int32)
    for backend in BACKENDS:
        assert narrow(backend, codes, Narrowing(), room=99)[1] is None
        assert narrow(backend, codes, Narrowing(), room=100)[1] is not None


@settings(max_examples=150)
@given(data=st.data(), n=st.integers(1, 50), low=st.sampled_from(LOW_BITS), nibbles=st.booleans())
def test_any_bytes_widen_alike(data: st.DataObject, n: int, low: int, nibbles: bool) -> None:
    dtype = data.draw(st.sampled_from([torch.int16, torch.int32]))
    cols = data.draw(st.sampled_from([c for c in range(1, n + 1) if n % c == 0])) if dtype == torch.int16 else 0
    form = Narrowing(data.draw(st.sampled_from([0, cols])), low, nibbles)

    def anything(kind: torch.dtype, size: int) -> Tensor:
        raw = data.draw(st.binary(min_size=size * kind.itemsize, max_size=size * kind.itemsize))
        return torch.frombuffer(bytearray(raw), dtype=kind) if raw else torch.empty(0, dtype=kind)

    parts = {name: anything(DTYPES[size], length) for name, (size, length) in form.sizes(n).items()}
    symbols = parts["symbols"]
    listed = torch.stack((symbols & 15, symbols >> 4), -1).view(-1)[:n] if nibbles else symbols
    exceptions = anything(dtype, int((listed == form.escape).sum()))
    first, second = (torch.full((n,), 9, dtype=dtype) for _ in range(2))
    assert reference.widen(parts, exceptions, form, first)
    assert cpu.widen(parts, exceptions, form, second)
    assert torch.equal(first, second)
    for wrong in (exceptions[:-1] if len(exceptions) else anything(dtype, 1), torch.cat((exceptions, exceptions[:1]))):
        if len(wrong) != len(exceptions):
            assert not reference.widen(parts, wrong, form, first)
            assert not cpu.widen(parts, wrong, form, second)
