"""The master-weight split: bit-equal backends, exhaustive over the high part, within its error bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statecodec import kernels
from statecodec.kernels import OUT_OF_RANGE

FORMATS = [(h, low) for h in (torch.bfloat16, torch.float16) for low in (torch.int8, torch.int16)]
IDS = [f"{str(h)[6:]}+{str(low)[6:]}" for h, low in FORMATS]
SPECIALS = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    3.4028235e38,
    -3.4028235e38,
    float("inf"),
    -float("inf"),
    65519.99,
    65520.0,
    2.0**-14,
]


def encode(name: str, x: Tensor, high: torch.dtype, low: torch.dtype) -> tuple[Tensor, Tensor, int]:
    top = torch.full(x.shape, -1, dtype=torch.int16, device=x.device).view(high)
    rest = torch.full(x.shape, -1, dtype=low, device=x.device)
    flags = kernels.get(name).encode_split(x, top, rest)
    return top, rest, flags


def decode(name: str, high: Tensor, low: Tensor) -> Tensor:
    out = torch.full(high.shape, torch.nan, device=high.device)
    kernels.get(name).decode_split(high, low, out)
    return out


def values(high: torch.dtype, n: int = 300_000) -> Tensor:
    """Random bits; for fp16 also its own range; the special values and the neighbours of every boundary."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (n,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    if high == torch.float16:
        x[::2] = torch.randn(len(x[::2]), generator=generator) * torch.exp(
            torch.randn(len(x[::2]), generator=generator) * 6
        )
    edges = (torch.arange(1, 256, dtype=torch.int64) << 23).unsqueeze(1) + torch.arange(-300, 300)
    return torch.cat((x, edges.to(torch.int32).view(-1).view(torch.float32), torch.tensor(SPECIALS)))


@pytest.mark.parametrize(("high", "low"), FORMATS, ids=IDS)
def test_backends_agree(high: torch.dtype, low: torch.dtype, device, same_bits) -> None:
    x = values(high)
    top, rest, flags = encode("reference", x, high, low)
    decoded = decode("reference", top, rest)
    for name, place in (("cpu", torch.device("cpu")), ("triton", device)):
        found = encode(name, x.to(place), high, low)
        assert found[2] == flags
        assert same_bits(found[0], top)
        assert same_bits(found[1], rest)
        assert same_bits(decode(name, top.to(place), rest.to(place)), decoded)


@pytest.mark.parametrize(("high", "low"), FORMATS, ids=IDS)
def test_every_high_pattern(high: torch.dtype, low: torch.dtype, device, same_bits) -> None:
    """All 65,536 patterns of the high part, lows from end to end: backends agree, re-encoding changes nothing."""
    reach = 127 if low == torch.int8 else 32767
    lows = torch.tensor([-reach, -reach // 2, -1, 0, 1, reach // 3, reach], dtype=low)
    top = torch.arange(65536, dtype=torch.int64).to(torch.int16).view(high).repeat_interleave(len(lows))
    rest = lows.repeat(65536)
    expected = decode("reference", top, rest)
    assert same_bits(decode("cpu", top, rest), expected)
    assert same_bits(decode("triton", top.to(device), rest.to(device)), expected)
    limit = 65520.0 if high == torch.float16 else float("inf")
    stored = encode("triton", expected[expected.abs() < limit].to(device), high, low)
    once = decode("triton", stored[0], stored[1])
    again = encode("triton", once, high, low)
    assert same_bits(again[0], stored[0])
    assert same_bits(again[1], stored[1])


@pytest.mark.parametrize("high", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_error_bounds(high: torch.dtype, device) -> None:
    """24 bits: within 1/512 of the high part's last place. 32 bits: exact (fp16: in its normal range)."""
    x = values(high)
    x = x[x.isfinite() & (x.abs() < (3.3e38 if high == torch.bfloat16 else 65504))].to(device)
    mantissa, smallest = (7, -126) if high == torch.bfloat16 else (10, -14)
    exponent = torch.frexp(x.to(torch.float64))[1].clamp(min=smallest + 1) - 1
    unit = torch.exp2((exponent - mantissa).to(torch.float64))
    eight = decode("triton", *encode("triton", x, high, torch.int8)[:2])
    error = (eight.to(torch.float64) - x.to(torch.float64)).abs()
    assert bool((error <= unit / 512).all())
    sixteen = decode("triton", *encode("triton", x, high, torch.int16)[:2])
    exact = sixteen.view(torch.int32) == x.view(torch.int32)
    if high == torch.bfloat16:
        assert bool(exact.all())
    else:
        assert bool(exact[x.abs() >= 2.0**-14].all())
        assert bool(((sixteen.to(torch.float64) - x.to(torch.float64)).abs() <= 2.0**-41).all())


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_out_of_range(name: str, device) -> None:
    place = device if name == "triton" else torch.device("cpu")
    x = torch.zeros(5000, device=place)
    for value, flags in ((65519.0, 0), (-65520.0, OUT_OF_RANGE), (float("inf"), 0), (float("nan"), 0)):
        x[4321] = value
        assert encode(name, x, torch.float16, torch.int8)[2] == flags
    assert encode(name, torch.full((3,), 3e38, device=place), torch.bfloat16, torch.int8)[2] == 0


def test_nothing_beyond_the_end(device, guarded) -> None:
    for n in (0, 1, 31, 4097):
        high, low, out = guarded((n,), torch.bfloat16), guarded((n,), torch.int8), guarded((n,), torch.float32)
        kernels.get("triton").encode_split(torch.ones(n, device=device), high, low)
        kernels.get("triton").decode_split(high, low, out)
        assert bool((out == 1).all())
    guarded.check()
