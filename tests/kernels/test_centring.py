"""Centring: lossless for any bytes, the same bits in both backends, and worth it for rows times columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statecodec.format.planes import CENTRED, CENTRED_NIBBLES, ZSTD, form
from statecodec.kernels import cpu, reference


def run(backend: object, plane: torch.Tensor, nibbles: bool) -> tuple[torch.Tensor, ...]:
    rows, cols = plane.shape
    made = tuple(torch.full(n, 0xAA, dtype=torch.uint8) for n in ((cols,), (rows,), (rows, cols)))
    backend.centre(plane, *made, nibbles=nibbles)
    back = torch.full_like(plane, 0x55)
    backend.uncentre(made[2], made[0], made[1], back, nibbles=nibbles)
    assert torch.equal(back, plane)
    return made


@settings(max_examples=60)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40), seed=st.integers(0, 99), nibbles=st.booleans())
def test_lossless_and_alike(rows: int, cols: int, seed: int, nibbles: bool) -> None:
    plane = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (rows, cols), np.uint8))
    for a, b in zip(run(cpu, plane, nibbles), run(reference, plane, nibbles), strict=True):
        assert torch.equal(a, b)


def test_a_sum_of_row_and_column_leaves_nothing() -> None:
    row, col = torch.arange(30).view(30, 1) * 3, torch.arange(20).view(1, 20) * 5
    columns, lines, residual = run(cpu, (row + col).to(torch.uint8), False)
    assert int((residual != residual[0, 0]).sum()) == 0
    assert columns[1] - columns[0] == 5
    assert lines[2] - lines[1] == 3


@pytest.mark.parametrize(("kind", "expected"), [("noise", ZSTD), ("product", CENTRED), ("nibbles", CENTRED_NIBBLES)])
def test_the_form_is_chosen_by_what_it_saves(kind: str, expected: int) -> None:
    rng = np.random.default_rng(0)
    structure = rng.normal(0, 12, (64, 1)) + rng.normal(0, 12, (1, 200))
    if kind == "nibbles":
        codes = np.clip(structure / 6 + rng.normal(8, 0.7, (64, 200)), 0, 15).astype(np.uint8)
        plane = codes[:, 0::2] | codes[:, 1::2] << 4
    else:
        plane = np.clip((structure if kind == "product" else 0) + rng.normal(128, 6, (64, 200)), 0, 255).astype(
            np.uint8
        )
    assert form(plane) == expected


@pytest.mark.parametrize("size", [0, 1, 3, 4, 1001])
def test_byte_counts(size: int) -> None:
    plane = torch.from_numpy(np.random.default_rng(size).integers(0, 9, size, np.uint8))
    expected = np.bincount(plane.numpy(), minlength=256)
    for backend in (cpu, reference):
        assert backend.byte_counts(plane).tolist() == expected.tolist()
