"""A FlashOptim run goes on with our optimizers: its state dicts, quantised or not, with the low bits of master weights.

It quantises on a GPU only: those states are made here in the structure of its source, and their numbers worked out in
float64. What it keeps without a GPU comes from the package itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from statecodec import optim
from statecodec.errors import OptimizerError
from tests.optim.helpers import parameters, relative, run

SHAPE = (24, 50)


def quantised(numel: int = SHAPE[0] * SHAPE[1], seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The states of a parameter as FlashAdamW saves them with `compress_state_dict`, and their moments in float64."""
    random = np.random.default_rng(seed)
    groups = -(-numel // 32)
    scales = {k: random.uniform(1e-4, 1e-2, groups).astype(np.float16) for k in ("exp_avg", "exp_avg_sq")}
    m, v = random.integers(-127, 128, numel, np.int8), random.integers(1, 256, numel, np.uint8)
    m[::32], v[::32] = -127, 255  # a group is divided by its largest number
    wide = {k: s.astype(np.float64).repeat(32)[:numel] for k, s in scales.items()}
    softsign = m / 127.0
    exact = {
        "exp_avg": softsign / (2 - abs(softsign)) * wide["exp_avg"],
        "exp_avg_sq": (v / 255.0 * wide["exp_avg_sq"]) ** 2,
    }
    values = {"step": torch.tensor(3)}
    for key, codes in (("exp_avg", m), ("exp_avg_sq", v)):
        values[f"{key}::quantized"] = torch.from_numpy(codes)
        values[f"{key}::scales"] = torch.from_numpy(scales[key])
    return values, exact


def group(**options: Any) -> dict[str, Any]:
    return {"lr": 1e-2, "initial_lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "quantize": True,
            "master_bytewidth": 3, "params": [0], **options}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_moments_are_decoded(dtype: torch.dtype) -> None:
    """Of bf16 parameters, scales are the bits of fp16 under the dtype bf16."""
    values, exact = quantised()
    for key in ("exp_avg", "exp_avg_sq"):
        values[f"{key}::quantized"] = values[f"{key}::quantized"].view(SHAPE)
        if dtype == torch.bfloat16:
            values[f"{key}::scales"] = values[f"{key}::scales"].view(torch.bfloat16)
    p = nn.Parameter(torch.ones(SHAPE, dtype=dtype))
    optimizer = optim.AdamW([p], lr=1e-2, moments="dense")
    optimizer.load_state_dict({"state": {0: values}, "param_groups": [group()]})
    for key, expected in exact.items():
        found = optimizer.state[p][key].decode().double().numpy().ravel()
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert optimizer.state[p]["step"] == 3
    encoded = optim.AdamW([p], lr=1e-2, dense_below=0)
    encoded.load_state_dict({"state": {0: values}, "param_groups": [group()]})
    assert {c.kind for c in encoded.load_report.changes if c.state in exact} == {"encoded"}


@pytest.mark.parametrize("form", ["int8", "int8 as numbers", "int16", "int16 as bits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_bits_of_master_weights(dtype: torch.dtype, form: str) -> None:
    """They are fractions of half a unit in the last place; ours are differences of bits."""
    torch.manual_seed(0)
    exact = torch.randn(SHAPE) * torch.logspace(-4, 3, SHAPE[1])
    exact[0] = 0.0
    exact[1] = (1 + 2.0**-8) * torch.ones(50) if dtype == torch.bfloat16 else (1 + 2.0**-11) * torch.ones(50)  # ties
    weight = exact.to(dtype)
    mantissa = 7 if dtype == torch.bfloat16 else 10
    floor = -126 if dtype == torch.bfloat16 else -14
    _, exponent = np.frexp(weight.double().numpy())
    half = 2.0 ** (np.where(weight.double().numpy() == 0, floor, np.maximum(exponent - 1, floor)) - mantissa - 1.0)
    most = 127 if "int8" in form else 32767
    fraction = np.clip((exact.double() - weight.double()).numpy() / half, -1, 1) * most
    codes = torch.from_numpy(np.copysign(np.floor(abs(fraction) + 0.5), fraction)).to(
        torch.int8 if most == 127 else torch.int16
    )
    expected = weight.double().numpy() + codes.double().numpy() / most * half
    saved = {"int8 as numbers": lambda: codes.to(dtype), "int16 as bits": lambda: codes.view(dtype)}.get(
        form, lambda: codes
    )()
    p = nn.Parameter(weight)
    optimizer = optim.AdamW([p], lr=1e-2, moments="dense", master_weights="split24" if most == 127 else "split32")
    moments = {"exp_avg": torch.zeros(SHAPE), "exp_avg_sq": torch.zeros(SHAPE), "step": torch.tensor(3)}
    options = group(master_bytewidth=3 if most == 127 else 4)
    optimizer.load_state_dict({"state": {0: {**moments, "error_bits": saved}}, "param_groups": [options]})
    found = optimizer.master_weight(p).double().numpy()
    error = abs(found - expected) / (2 * half)
    assert error.max() < (1 / 200 if most == 127 else 1 / 500), "units in the last place"
    assert np.mean(error) < (1 / 700 if most == 127 else 1e-4)
    assert torch.equal(p, weight)
    assert "weight_low" in {c.state for c in optimizer.load_report.changes if c.kind == "converted"}


@pytest.mark.parametrize("split", ["split24", "split32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_stays_with_every_code(dtype: torch.dtype, split: str) -> None:
    """Also beside powers of two, whose inner neighbours are nearer, and with codes that no master weight gives."""
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = weight[weight.isfinite() & (weight.float().abs() < 3e38)]
    codes = torch.tensor([-128, -127, -64, -1, 0, 1, 64, 126, 127], dtype=torch.int8)
    p = nn.Parameter(weight.repeat_interleave(len(codes)))
    optimizer = optim.AdamW([p], moments="dense", master_weights=split)
    zeros = torch.zeros(p.shape)
    values = {"exp_avg": zeros, "exp_avg_sq": zeros, "step": 3, "error_bits": codes.repeat(len(weight))}
    optimizer.load_state_dict({"state": {0: values}, "param_groups": [group()]})
    exact = optimizer.master_weight(p)
    # A split rounds ties away from zero, torch's cast to even: a bit nearer to the weight both give the weight.
    assert torch.equal(torch.nextafter(exact, p.detach().float()).to(dtype), p)


def test_a_master_weight_just_below_a_power_of_two() -> None:
    exact = torch.tensor([[1 - 2.0**-9, -1 + 2.0**-9]])
    p = nn.Parameter(exact.to(torch.bfloat16))
    optimizer = optim.AdamW([p], moments="dense", master_weights="split32")
    zeros, codes = torch.zeros(p.shape), torch.tensor([[-64, 64]], dtype=torch.int8)
    values = {"exp_avg": zeros, "exp_avg_sq": zeros, "step": 3, "error_bits": codes}
    optimizer.load_state_dict({"state": {0: values}, "param_groups": [group()]})
    torch.testing.assert_close(optimizer.master_weight(p), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "Lion", "SGD", "SGDW"])
def test_what_the_package_saves_without_a_gpu(optimizer: str) -> None:
    """Plain moments: both go on alike."""
    flashoptim = pytest.importorskip("flashoptim")
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.01, **({"momentum": 0.9} if "SGD" in optimizer else {})}
    a, b, start = parameters(), parameters(), parameters()
    theirs = getattr(flashoptim, f"Flash{optimizer}")(
        b.values(), quantize=False, fused=False, master_weight_bits=None, **options
    )
    run(theirs, b, range(5))
    ours = getattr(optim, optimizer)(a.values(), moments="dense", **options)
    with torch.no_grad():
        for k in a:
            a[k].copy_(b[k])
            start[k].copy_(b[k])
    ours.load_state_dict(theirs.state_dict())
    changes = [c for c in ours.load_report.changes if c.relative_rms != 0]
    assert {c.state for c in changes} <= ({"step"} if optimizer in ("Lion", "SGD", "SGDW") else set()), changes
    for each, p in ((ours, a), (theirs, b)):
        run(each, p, range(5, 10))
    assert all(relative(a[k] - start[k], b[k] - start[k]) < 1e-4 for k in a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg::scales": torch.ones(7)}, "7 torch.float32 scales for 1200"),
        ({"exp_avg::scales": torch.ones(38, dtype=torch.int64)}, "38 torch.int64 scales"),
        ({"exp_avg::scales": torch.ones(38, dtype=torch.complex64)}, "38 torch.complex64 scales"),
        ({"exp_avg::scales": torch.ones(38, device="meta")}, "belong together"),
        ({"exp_avg::quantized": torch.ones(SHAPE, dtype=torch.int8).to_sparse()}, "belong together"),
        ({"error_bits": torch.ones(SHAPE, dtype=torch.int8, device="meta")}, "a tensor with data"),
        ({"error_bits": torch.ones(SHAPE, dtype=torch.int8).to_sparse()}, "a tensor with data"),
        ({"exp_avg::scales": None}, "belong together"),
        ({"exp_avg::quantized": torch.ones(SHAPE)}, "float32 codes"),
        ({"error_bits": torch.ones(3, dtype=torch.int8)}, "error_bits of shape"),
        ({"error_bits": torch.ones(SHAPE, dtype=torch.int64)}, "int8 or int16"),
        ({"error_bits": "x"}, "a tensor with data, found str"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    values, _ = quantised()
    for key in ("exp_avg", "exp_avg_sq"):
        values[f"{key}::quantized"] = values[f"{key}::quantized"].view(SHAPE)
    optimizer = optim.AdamW([nn.Parameter(torch.ones(SHAPE, dtype=torch.bfloat16))], lr=1e-2)
    with pytest.raises(OptimizerError, match=message):
        optimizer.load_state_dict({"state": {0: {**values, **change}}, "param_groups": [group()]})
    assert not optimizer.state


def test_scales_tell_how_many_ranks_saved() -> None:
    """One rank or two have 38 for 1200 numbers, three have 39: no run gives both, and codes tell 1 from 2."""
    params = [nn.Parameter(torch.ones(SHAPE)) for _ in range(2)]
    optimizer = optim.AdamW(params, lr=1e-2)
    values = {k: v.view(SHAPE) if k.endswith("quantized") else v for k, v in quantised()[0].items()}
    broken = [{"exp_avg_sq::scales": torch.ones(39)}, {"exp_avg::quantized": torch.ones(SHAPE, dtype=torch.int8)}]
    for change in broken:
        state = {0: values, 1: {**values, **change}}
        with pytest.raises(OptimizerError, match="fit no number of ranks"):
            optimizer.load_state_dict({"state": state, "param_groups": [group(params=[0, 1])]})
    assert not optimizer.state
    nothing = {"exp_avg::quantized": torch.zeros(SHAPE, dtype=torch.int8), "exp_avg::scales": torch.zeros(38)}
    optimizer.load_state_dict({"state": {0: values, 1: {**values, **nothing}}, "param_groups": [group(params=[0, 1])]})


def test_what_belongs_to_nothing_is_reported() -> None:
    values, _ = quantised()
    for key in ("exp_avg", "exp_avg_sq"):
        values[f"{key}::quantized"] = values[f"{key}::quantized"].view(SHAPE)
    optimizer = optim.AdamW([nn.Parameter(torch.ones(SHAPE))], lr=1e-2)
    extra = {"foo::scales": torch.ones(3), 7: torch.ones(3)}
    optimizer.load_state_dict({"state": {0: {**values, **extra}}, "param_groups": [group()]})
    assert {c.state for c in optimizer.load_report.changes if c.kind == "dropped"} == {"foo::scales", "7"}
