"""Companded quantisation: every backend writes the bits of the reference, and what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from statecodec import kernels
from statecodec.kernels import INF, NAN, NEGATIVE
from statecodec.kernels.curves import Curve

CURVES = [
    Curve("softsign", 8, True), Curve("linear", 8, True), Curve("sqrt", 8, False), Curve("log", 8, False, 16),
    Curve("softsign", 4, True), Curve("linear", 4, True), Curve("sqrt", 4, False), Curve("log", 4, False, 2),
]  # fmt: skip
SHAPES = [(1, 1), (3, 7), (5, 129), (4, 256), (2, 1000), (70, 2)]
GROUPS = [2, 32, 100, 128]
NAN_, INF_ = float("nan"), float("inf")
EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 5.9e-39, 3.4028235e38, -3.4028235e38, 1.0, -1.0, 1e-30, 1e30]


def hard(shape: tuple[int, int], signed: bool, seed: int = 0) -> Tensor:
    """Magnitudes over the whole fp32 range, rows of zeros, the extremes scattered about."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator) * 25)
    x = x.nan_to_num(posinf=3e38, neginf=-3e38)
    x.view(-1)[:: max(1, x.numel() // 12)] = torch.tensor(EXTREMES).repeat(2)[
        : len(x.view(-1)[:: max(1, x.numel() // 12)])
    ]
    if shape[0] > 2:
        x[1], x[2] = 0.0, torch.randn(shape[1], generator=generator)
    return x if signed else x.abs()


def outputs(rows: int, cols: int, curve: Curve, group: int, empty: object) -> tuple[Tensor, Tensor]:
    width = cols if curve.bits == 8 else -(-cols // 2)
    codes = torch.int8 if curve.signed and curve.bits == 8 else torch.uint8
    return empty((rows, width), codes), empty((rows, -(-cols // group)), torch.bfloat16)  # type: ignore[operator]


def encode(name: str, x: Tensor, curve: Curve, group: int, empty: object = torch.empty) -> tuple[Tensor, Tensor, int]:
    make = empty if empty is not torch.empty else lambda shape, dtype: torch.empty(shape, dtype=dtype, device=x.device)
    codes, scales = outputs(*x.shape, curve, group, make)
    flags = kernels.get(name).encode_companded(x, codes, scales, curve=curve, group=group)
    return codes, scales, flags


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("curve", CURVES, ids=lambda c: f"{c.name}{c.bits}")
def test_backends_agree(curve: Curve, shape: tuple[int, int], group: int, device, guarded, same_bits) -> None:
    x = hard(shape, curve.signed)
    codes, scales, flags = encode("reference", x, curve, group)
    assert flags == 0
    assert all(same_bits(a, b) for a, b in zip(encode("cpu", x, curve, group)[:2], (codes, scales), strict=True))
    found = encode("triton", x.to(device), curve, group, guarded)
    assert found[2] == 0
    assert same_bits(found[0], codes)
    assert same_bits(found[1], scales)

    decoded = torch.empty(shape)
    kernels.get("reference").decode_companded(codes, scales, decoded, curve=curve, group=group)
    for name, place in (("cpu", torch.device("cpu")), ("triton", device)):
        out = guarded(shape, torch.float32) if name == "triton" else torch.full(shape, torch.nan)
        kernels.get(name).decode_companded(codes.to(place), scales.to(place), out, curve=curve, group=group)
        assert same_bits(out, decoded)
    guarded.check()
    if not curve.signed:
        assert bool(((decoded > 0) == (x > 0)).all()), "a positive second moment decodes to a positive number"


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_values(data: st.DataObject, device, same_bits) -> None:
    curve = data.draw(st.sampled_from(CURVES))
    group = 2 * data.draw(st.integers(1, 70))
    rows, cols = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 150))
    floats = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from(EXTREMES))
    few = data.draw(st.lists(floats, min_size=1, max_size=20))
    x = torch.tensor(np.resize(np.array(few, np.float32), rows * cols)).view(rows, cols)
    x = x if curve.signed else x.abs()
    expected = encode("reference", x, curve, group)
    for name, y in (("cpu", x), ("triton", x.to(device))):
        found = encode(name, y, curve, group)
        assert same_bits(found[0], expected[0])
        assert same_bits(found[1], expected[1])


@pytest.mark.parametrize("curve", CURVES[:4], ids=lambda c: c.name)
def test_every_code_boundary(curve: Curve, device, same_bits) -> None:
    """Ratios one fp32 step to either side of each rounding boundary, under several scales, are correctly rounded."""
    levels = torch.from_numpy(curve.levels.astype(np.float64))
    middle = ((levels[1:].sqrt() + levels[:-1].sqrt()) / 2) ** 2
    near = torch.cat([middle * (1 + k * 2.0**-24) for k in range(-40, 41)]).to(torch.float32)
    scales = torch.tensor([1.0, 1.5, 1.9921875, 3e-38, 1e-40, 2e38])
    x = torch.cat([torch.cat((near, torch.ones(1))) * s for s in scales]).view(len(scales), -1)
    expected = encode("reference", x, curve, 1 << 16)
    found = encode("triton", x.to(device), curve, 1 << 16)
    assert same_bits(found[0], expected[0])


def test_wide_groups(device, same_bits) -> None:
    """Beyond what a tile holds."""
    for curve in (CURVES[0], CURVES[7]):
        for group, cols in ((1000, 2500), (5000, 12001)):
            x = hard((3, cols), curve.signed)
            expected = encode("reference", x, curve, group)
            found = encode("triton", x.to(device), curve, group)
            assert same_bits(found[0], expected[0])
            assert same_bits(found[1], expected[1])
            out = torch.full(x.shape, torch.nan, device=device)
            kernels.get("triton").decode_companded(*found[:2], out, curve=curve, group=group)
            again = torch.empty(x.shape)
            kernels.get("reference").decode_companded(*expected[:2], again, curve=curve, group=group)
            assert same_bits(out, again)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(
    ("values", "signed", "flags"),
    [
        ([1.0, NAN_], True, NAN), ([INF_, 1.0], True, INF), ([-INF_, NAN_], True, INF | NAN), ([1.0, -2.0], True, 0),
        ([1.0, -1.0], False, NEGATIVE), ([1.0, -1e-45], False, NEGATIVE), ([0.0, -0.0], False, 0),
        ([NAN_, -1.0], False, NAN | NEGATIVE), ([-INF_, 0.0], False, INF | NEGATIVE),
    ],
)  # fmt: skip
def test_flags(name: str, values: list[float], signed: bool, flags: int, device) -> None:
    x = torch.zeros(5, 200)
    x[3, 150], x[1, 7] = values[0], values[1]
    curve = CURVES[0] if signed else CURVES[2]
    place = device if name == "triton" else torch.device("cpu")
    assert encode(name, x.to(place), curve, 64)[2] == flags


@pytest.mark.parametrize("curve", CURVES, ids=lambda c: f"{c.name}{c.bits}")
def test_zeros_and_nothing(curve: Curve, device) -> None:
    codes, scales, flags = encode("triton", torch.zeros(3, 70, device=device), curve, 32)
    assert flags == 0
    assert not codes.any()
    assert not scales.view(torch.int16).any()
    for shape in ((0, 5), (5, 0)):
        assert encode("triton", torch.zeros(shape, device=device), curve, 32)[2] == 0
