"""Byte planes, as packing makes them, against a bytes-level oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from statecodec.format.words import words_of
from statecodec.kernels.cpu import planes

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn,
]  # fmt: skip
ROTATED = {torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128}


def oracle(data: bytes, width: int, rotate: bool) -> list[bytes]:
    """One Python integer at a time, straight from the definition."""
    words = [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]
    if rotate:
        bits = 8 * width
        words = [((w << 1) | (w >> (bits - 1))) & ((1 << bits) - 1) for w in words]
    return [bytes((w >> (8 * k)) & 0xFF for w in words) for k in range(width)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 7, 4095, 4097])
def test_split_and_merge(dtype: torch.dtype, n: int) -> None:
    data = np.random.default_rng(n).integers(0, 2 if dtype is torch.bool else 256, n * dtype.itemsize, np.uint8)
    words = words_of(torch.from_numpy(data).view(dtype) if n else torch.empty(0, dtype=dtype))
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    assert (words.array.itemsize, words.rotate) == (width, dtype in ROTATED)
    if width == 1:  # packed as they are
        assert words.array.tobytes() == data.tobytes()
        return
    count = data.size // width
    buffer = np.full(width * count + 8, 0x7F, np.uint8)
    split = buffer[: width * count].reshape(width, count)
    planes.split_words(words.unsigned, split, words.rotate)
    assert [plane.tobytes() for plane in split] == oracle(data.tobytes(), width, words.rotate)
    assert (buffer[width * count :] == 0x7F).all(), "wrote past the planes"
    merged = np.empty_like(words.unsigned)
    planes.merge_words(list(split), merged, words.rotate)
    assert merged.tobytes() == data.tobytes()


def test_constant() -> None:
    for n in (1, 100, 4096, 10_000):
        x = np.full(n, 200, np.uint8)
        assert planes.constant(x) == 200
        if n > 1:
            for at in (0, n // 2, n - 1):
                y = x.copy()
                y[at] = 201
                assert planes.constant(y) == -1
