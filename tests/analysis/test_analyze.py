"""`analyze` on trained models: SNRs of what is in the files, averages, rules from end to end, the curve."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import statecodec
from statecodec.choose.curve import CurvePoint
from statecodec.errors import UsageError
from statecodec.optim import SlimAdam

TABLE = Path(__file__).parents[1] / "choose" / "data" / "slimadam_gpt2_lr0.0003.csv"


def oracle(path: Path, dims: tuple[int, ...], index: int = 0) -> float:
    """SNR of one second moment in numpy, from torch.load."""
    v = torch.load(path, weights_only=True)["optimizer"]["state"][index]["exp_avg_sq"].numpy().astype(np.float64)
    mean, var = np.atleast_1d(v.mean(axis=dims)), np.atleast_1d(v.var(axis=dims))
    with np.errstate(divide="ignore"):
        return float((mean[mean > 0] ** 2 / var[mean > 0]).mean())


def test_averages_over_the_run(run: list[Path]) -> None:
    found = statecodec.analyze(*run)
    first = found.tensors[0]
    assert len(found.steps) == 3
    assert first.ratios.keys() == {(0,), (1,), (0, 1)} or len(first.shape) == 4
    for dims, ratio in first.ratios.items():
        assert ratio == pytest.approx(np.mean([oracle(p, dims) for p in run]), rel=1e-6)
    assert len(found.layers) == len(found.tensors)
    assert all(t.dims == t.recommended == () for t in found.tensors if t.kind in ("vector", "norm"))


def test_what_sharing_costs_is_what_the_update_loses(run: list[Path]) -> None:
    found = statecodec.analyze(*run)
    saved = torch.load(run[-1], weights_only=True)["optimizer"]
    dims = {"layer": [t.dims for t in found.tensors], "type": [t.type_dims for t in found.tensors]}
    dims["table"] = [t.recommended or () for t in found.tensors]
    assert any(dims["layer"])
    assert found.update_error.keys() == dims.keys()
    (beta1, beta2), eps = saved["param_groups"][0]["betas"], saved["param_groups"][0]["eps"]
    for basis, chosen in dims.items():
        off = size = 0.0
        for state, shared in zip(saved["state"].values(), chosen, strict=True):
            step = float(state["step"])
            m, v = (state[key].numpy().astype(np.float64) for key in ("exp_avg", "exp_avg_sq"))
            m, v = m / (1 - beta1**step), v / (1 - beta2**step)
            mean = v.mean(shared, keepdims=True) if shared else v
            exact, other = m / (np.sqrt(v) + eps), m / (np.sqrt(mean) + eps)
            off, size = off + ((other - exact) ** 2).sum(), size + (exact**2).sum()
        assert found.update_error[basis] == pytest.approx(np.sqrt(off / size), rel=1e-4, abs=1e-6)


def test_convolutions_have_all_subsets(runs: dict[str, list[Path]]) -> None:
    found = statecodec.analyze(runs["conv"][-1])
    kernel = next(t for t in found.tensors if len(t.shape) == 4 and t.shape[0] == 48)
    assert len(kernel.ratios) == 15
    assert kernel.kind == "conv"


def test_fused_projections_show_their_parts(runs: dict[str, list[Path]]) -> None:
    path = runs["gpt"][-1]
    found = statecodec.analyze(path)
    fused = next(t for t in found.tensors if t.kind == "fused_qkv")
    state = torch.load(path, weights_only=True)["optimizer"]
    names = [t.name for t in found.tensors]
    v = state["state"][names.index(fused.name)]["exp_avg_sq"]
    for part, rows in zip("qkv", v.chunk(3), strict=True):
        values = rows.numpy().astype(np.float64)
        expected = (values.mean(0) ** 2 / values.var(0)).mean()
        assert fused.parts[f"{fused.name}[{part}]"][(0,)] == pytest.approx(expected, rel=1e-6)


def test_rules_go_from_analyze_to_compress_and_slimadam(run: list[Path], tmp_path: Path) -> None:
    found = statecodec.analyze(*run)
    found.save_rules(tmp_path / "rules.json", "layer")
    made = statecodec.compress(run[-1], tmp_path / "a.sc.safetensors", rules_file=tmp_path / "rules.json")
    stored = {t.param: t.codec for t in made.tensors if t.role == "exp_avg_sq"}
    for tensor in found.tensors:
        shared = f"shared(dims=[{','.join(map(str, tensor.dims))}])"
        assert (stored[tensor.name].startswith("shared")) == bool(tensor.dims), tensor.name
        if tensor.dims and tensor.dims != (1,):
            assert stored[tensor.name] == shared
    assert not any(t.codec.startswith("shared") for t in made.tensors if t.role != "exp_avg_sq")
    params = [(t.name, torch.nn.Parameter(torch.zeros(t.shape))) for t in found.tensors]
    optimizer = SlimAdam(params, rules=str(tmp_path / "rules.json"))
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for tensor, (_, p) in zip(found.tensors, params, strict=True):
        codec = optimizer.state[p]["exp_avg_sq"].codec
        assert getattr(codec, "dims", ()) == tensor.dims


def test_compressed_checkpoints_are_measured_as_stored(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    made = statecodec.compress(runs["mlp"][-1], tmp_path / "a.sc.safetensors", preset="lossless")
    assert statecodec.analyze(made.path).layers == statecodec.analyze(runs["mlp"][-1]).layers
    assert any("compressed" in note for note in statecodec.analyze(made.path).notes)


def test_curve_and_presets(run: list[Path]) -> None:
    found = statecodec.analyze(run[-1], snr=False, curve=True)
    assert not found.tensors
    line = [p for p in found.curve if p.label is None]
    assert [p.nbytes for p in line] == sorted((p.nbytes for p in line), reverse=True)
    assert [p.step_error for p in line] == sorted(p.step_error for p in line)
    assert {p.label for p in found.curve if p.label} == {"resume", "small", "tiny"}


CURVE_SIZE, CURVE_ERROR = 0.02, 0.03  # how far, relatively, the curve may be from the file that compress makes


def assert_is_made(path: Path, fraction: float | str) -> tuple[CurvePoint, statecodec.Report]:
    """A point of the curve against the file of `compress` at the same step error, or of the same preset."""
    curve = statecodec.analyze(path, snr=False, curve=True).curve
    (point,) = (p for p in curve if fraction in (p.label, None if p.label else p.step_error))
    options: dict[str, Any] = {"preset": fraction} if isinstance(fraction, str) else {"max_step_error": fraction}
    made = statecodec.compress(path, path.with_suffix(".sc.safetensors"), force=True, **options)
    assert point.nbytes == pytest.approx(sum(t.bytes_after for t in made.tensors), rel=CURVE_SIZE)
    assert point.bytes_per_param == pytest.approx(point.nbytes / made.num_params, rel=1e-3)
    if point.weight_step_error:
        assert made.total is not None
        assert point.weight_step_error == pytest.approx(made.total["weight_step_error"], rel=CURVE_ERROR)
    else:
        assert "weight_step_error" not in (made.total or {})
    return point, made


@pytest.mark.parametrize("name", ["resume", "small", "tiny"])
def test_the_curve_is_what_encoding_gives(run: list[Path], name: str) -> None:
    assert_is_made(run[-1], name)


def trained(path: Path, make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype = torch.float32) -> Path:
    """A net with a matrix of three pieces, after 20 steps."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(640, 520, bias=False), torch.nn.Tanh(), torch.nn.Linear(520, 96))
    model = torch.nn.Sequential(*layers).to(dtype)
    optimizer = make(model.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 640).to(dtype)).square().mean()
        (loss * (1000 if dtype == torch.float16 else 1)).backward()  # or its second moments would be 0
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def lion(params: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
    """SGD whose checkpoint is one of Lion."""
    optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9)

    def renamed(_: object, state: dict[str, Any]) -> dict[str, Any]:
        moments = {i: {"exp_avg": s["momentum_buffer"]} for i, s in state["state"].items()}
        groups = [{"lr": g["lr"], "betas": (0.9, 0.99), "params": g["params"]} for g in state["param_groups"]]
        return {"state": moments, "param_groups": groups}

    optimizer.register_state_dict_post_hook(renamed)
    return optimizer


@pytest.mark.parametrize("fraction", [0.01, 0.1, "tiny"])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (torch.optim.AdamW, torch.float32),
        (torch.optim.AdamW, torch.bfloat16),
        (lambda p: torch.optim.AdamW(p, betas=(0.9, 0.9), eps=1e-4), torch.float16),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.float32),
        (lion, torch.float32),
        (lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=1e-3), torch.float32),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3), torch.float32),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9), torch.float32),
    ],
    ids=["adamw", "bf16", "fp16", "sgd", "lion", "muon", "rmsprop", "rmsprop with momentum"],
)
def test_the_curve_of_every_optimizer(
    make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype, fraction: float | str, tmp_path: Path
) -> None:
    """Exact tensors count as what they pack to, whatever their dtype, and predicted codes as predicted."""
    assert_is_made(trained(tmp_path / "x.pt", make, dtype), fraction)


@pytest.mark.parametrize(("lr", "fraction"), [(3e-6, 0.01), (1e-1, 1.0)], ids=["24 bits", "bf16"])
def test_the_curve_gives_the_error_that_weights_will_have(lr: float, fraction: float, tmp_path: Path) -> None:
    """Where the finest or the coarsest grid binds, that is not the one that was asked for."""
    point, _ = assert_is_made(trained(tmp_path / "x.pt", lambda p: lion(p, lr)), fraction)
    assert point.weight_step_error is not None
    assert abs(math.log(point.weight_step_error / fraction)) > 0.5
    assert point.step_error == fraction


def test_the_curve_says_where_weights_are_exact_or_have_no_step(tmp_path: Path) -> None:
    exact, _ = assert_is_made(trained(tmp_path / "x.pt", torch.optim.AdamW, torch.bfloat16), 0.1)
    unknown, _ = assert_is_made(trained(tmp_path / "x.pt", torch.optim.RMSprop), 0.1)
    assert (exact.weight_step_error, unknown.weight_step_error) == (0.0, None)


def test_the_curve_counts_what_follows_from_other_tensors(tmp_path: Path) -> None:
    """bf16 weights beside their masters, an average, and a copy: `compress` stores the first two as a distance."""
    path = trained(tmp_path / "x.pt", torch.optim.AdamW)
    saved = torch.load(path, weights_only=True)
    masters = [{"master_param": w.clone()} for w in saved["model"].values()]
    for index, state in enumerate(masters):
        saved["optimizer"]["state"][index].update(state)
    saved["ema"] = {name: w * 0.999 for name, w in saved["model"].items()}
    saved["model"] = {name: w.bfloat16() for name, w in saved["model"].items()}
    saved["copy"] = {name: w.clone() for name, w in saved["model"].items()}
    torch.save(saved, path)
    _, made = assert_is_made(path, 0.1)
    assert {"ulps", "same"} <= {t.codec.split("(")[0] for t in made.tensors}


def test_tables_are_taken_like_checkpoints() -> None:
    found = statecodec.analyze(TABLE, TABLE)
    assert found.saved["layer"] == pytest.approx(0.994, abs=5e-4)
    assert json.loads(json.dumps(found.to_json()))["tensors"][0]["recommended"] == [1]


def test_what_it_refuses(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.randn(4, 4)}}, tmp_path / "weights.pt")
    with pytest.raises(UsageError, match=r"no second moments.*--curve alone needs none"):
        statecodec.analyze(tmp_path / "weights.pt")
    with pytest.raises(UsageError, match="counted in optimizer steps"):
        statecodec.analyze(tmp_path / "weights.pt", snr=False, curve=True)
    with pytest.raises(UsageError, match="at least one"):
        statecodec.analyze()
    with pytest.raises(UsageError, match="cutoff=nan"):
        statecodec.analyze(runs["mlp"][0], cutoff=float("nan"))
    with pytest.raises(UsageError, match="either checkpoints or SNR tables"):
        statecodec.analyze(TABLE, runs["mlp"][0])
    with pytest.raises(UsageError, match="curve needs a checkpoint"):
        statecodec.analyze(TABLE, curve=True)
    made = statecodec.compress(runs["mlp"][0], tmp_path / "a.sc.safetensors")
    with pytest.raises(UsageError, match="give the original"):
        statecodec.analyze(made.path, curve=True)
    with pytest.raises(UsageError, match="not of one run"):
        statecodec.analyze(*others(tmp_path))


def others(folder: Path) -> list[Path]:
    """Two checkpoints of one parameter name and different shapes."""
    paths = []
    for width in (8, 12):
        net = torch.nn.Linear(width, width)
        optimizer = torch.optim.AdamW(net.named_parameters())
        net(torch.randn(2, width)).sum().backward()
        optimizer.step()
        paths.append(folder / f"{width}.pt")
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, paths[-1])
    return paths


def test_negative_second_moments_have_no_snr(tmp_path: Path) -> None:
    path = others(tmp_path)[0]
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer"]["state"][0]["exp_avg_sq"][0, 0] = -1.0
    torch.save(checkpoint, path)
    with pytest.raises(UsageError, match="negative"):
        statecodec.analyze(path)
