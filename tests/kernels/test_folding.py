"""Block means: bit-equal backends (the same tree of additions), true means in the tail, flags."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statecodec import kernels
from statecodec.kernels import INF, NAN

# The interpreter computes in numpy, which warns where a GPU just gives an infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def fold(name: str, x: Tensor, block: int, empty: object = None) -> tuple[Tensor, int]:
    shape = (x.shape[0], -(-x.shape[1] // block))
    out = empty(shape, torch.float32) if empty else torch.full(shape, torch.nan, device=x.device)  # type: ignore[operator]
    return out, kernels.get(name).fold_mean(x, out, block=block)


@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (5, 64), (2, 20000), (1, 32768), (130, 3)], ids=str)
@pytest.mark.parametrize("block", [1, 2, 8, 64, 4096, 16384])
def test_backends_agree(block: int, shape: tuple[int, int], device, guarded, same_bits) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e3
    expected, _ = fold("reference", x, block)
    assert same_bits(fold("cpu", x, block)[0], expected)
    assert same_bits(fold("triton", x.to(device), block, guarded)[0], expected)
    wide = torch.empty(shape)
    kernels.get("reference").unfold(expected, wide, block=block)
    for name, place in (("cpu", torch.device("cpu")), ("triton", device)):
        out = guarded(shape, torch.float32) if name == "triton" else torch.empty(shape)
        kernels.get(name).unfold(expected.to(place), out, block=block)
        assert same_bits(out, wide)
    guarded.check()
    exact = torch.stack([p.to(torch.float64).mean(1) for p in x.split(block, 1)], 1)
    assert torch.allclose(expected.to(torch.float64), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_flags(name: str, device) -> None:
    x = torch.ones(4, 100, device=device if name == "triton" else "cpu")
    assert fold(name, x, 8)[1] == 0
    x[2, 99] = float("inf")
    assert fold(name, x, 8)[1] == INF
    x[0, 0] = float("nan")
    assert fold(name, x, 8)[1] == INF | NAN
    x[:] = 3e38  # the sum of a block overflows
    assert fold(name, x, 8)[1] == INF
