"""Byte planes against a bytes-level oracle, on both CPU backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from statecodec import kernels

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


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 7, 4095, 4097])
def test_split_and_merge(backend: str, dtype: torch.dtype, n: int) -> None:
    data = np.random.default_rng(n).integers(0, 2 if dtype is torch.bool else 256, n * dtype.itemsize, np.uint8)
    x = torch.from_numpy(data).view(dtype) if n else torch.empty(0, dtype=dtype)
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    count = data.size // width
    buffer = torch.full((width * count + 8,), 0x7F, dtype=torch.uint8)
    planes = buffer[: width * count].view(width, count)
    kernel = kernels.get(backend)
    kernel.split_planes(x, planes)
    assert [bytes(p.numpy()) for p in planes] == oracle(data.tobytes(), width, dtype in ROTATED)
    assert (buffer[width * count :] == 0x7F).all(), "wrote past the planes"
    out = torch.empty_like(x)
    kernel.merge_planes(list(planes), out)
    assert bytes(out.view(torch.uint8).numpy() if n else b"") == data.tobytes()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_constant_byte(backend: str) -> None:
    kernel = kernels.get(backend)
    for n in (1, 100, 4096, 10_000):
        x = torch.full((n,), 200, dtype=torch.uint8)
        assert kernel.constant_byte(x) == 200
        if n > 1:
            for at in (0, n // 2, n - 1):
                y = x.clone()
                y[at] = 201
                assert kernel.constant_byte(y) == -1
