"""The budget against float64: every tensor's error is the asked fraction of its own optimizer step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import statecodec
from statecodec.choose import step_size, widths
from statecodec.choose.budget import Budget, codes_per_octave
from statecodec.codecs import Codec, Uniform, chunking
from statecodec.errors import UsageError, VerificationFailed
from statecodec.kernels.reference.statistics import Comparison
from statecodec.progress import Meter
from statecodec.verbs.compress import open_source

FRACTIONS = (0.003, 0.01, 0.1, 0.3)
LR, BETAS, EPS = 1e-3, (0.9, 0.95), 1e-8


def trained(path: Path, *, lr: float = LR, steps: int = 30, amsgrad: bool = False, width: int = 96) -> Path:
    """A small network after AdamW steps on noise, in torch's own checkpoint."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(200, width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 50))
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=LR, betas=BETAS, eps=EPS, amsgrad=amsgrad)
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(0, 180, (64,))
        nn.functional.cross_entropy(net(tokens), tokens % 50).backward()
        optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = lr
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def update(state: dict[str, Any]) -> np.ndarray:
    """Adam's direction of one parameter, in numpy float64."""
    root = "max_exp_avg_sq" if "max_exp_avg_sq" in state else "exp_avg_sq"  # of amsgrad: arXiv 1904.09237
    m, v = (state[k].double().numpy() for k in ("exp_avg", root))
    t = float(state["step"])
    return (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean()))


def errors(exact: Path, other: Path) -> dict[str, tuple[float, float]]:
    """parameter -> (error of its update, error of its weight), in steps, from torch.load and numpy alone."""
    a, b = (torch.load(p, weights_only=True) for p in (exact, other))
    found = {}
    for index, name in enumerate(a["model"]):
        u, w = (update(c["optimizer"]["state"][index]) for c in (a, b))
        move = (b["model"][name].double() - a["model"][name].double()).numpy()
        found[name] = rms(w - u) / rms(u), rms(move) / (LR * rms(u))
    return found


def restored(path: Path, **options: Any) -> tuple[statecodec.Report, Path]:
    report = statecodec.compress(path, path.with_name("made.sc.safetensors"), force=True, **options)
    back = path.with_name("back.pt")
    statecodec.restore(report.path, back, force=True)
    return report, back


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_every_tensor_is_off_by_the_fraction_that_was_asked_for(fraction: float, tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt")
    report, back = restored(path, max_step_error=fraction, verify=True)
    content = torch.load(path, weights_only=True)
    for index, (name, (of_update, of_weight)) in enumerate(errors(path, back).items()):
        weight = content["model"][name]
        if weight.numel() >= 4096:
            one_step = LR * rms(update(content["optimizer"]["state"][index]))
            finest = 2.0**-16 / math.sqrt(12) * rms(weight.double().numpy()) / one_step  # never finer than 24 bits
            assert 0.5 * fraction < of_update <= fraction * 1.002, name
            assert 0.5 * fraction < of_weight <= max(fraction, finest) * 1.01, name
        else:
            assert of_update == of_weight == 0.0, name
    assert report.total is not None
    assert report.asked == {"u_rms": fraction, "weight_step_error": fraction}
    assert report.preset is None
    assert report.total["u_rms"] <= fraction * 1.001
    if fraction >= 0.01:
        assert report.total["weight_step_error"] <= fraction * 1.002


@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_amsgrad_divides_by_the_largest_second_moment(fraction: float, tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt", amsgrad=True)
    content = torch.load(path, weights_only=True)
    for state in content["optimizer"]["state"].values():  # as after many more steps
        state["exp_avg_sq"] = state["max_exp_avg_sq"] * torch.rand_like(state["max_exp_avg_sq"])
    torch.save(content, path)
    report, back = restored(path, max_step_error=fraction)
    for name, (of_update, of_weight) in errors(path, back).items():
        if of_update or of_weight:
            assert 0.5 * fraction < of_update <= fraction * 1.002, name
            assert 0.5 * fraction < of_weight <= fraction * 1.01 or fraction == 0.01, name
    assert report.total is not None
    assert statecodec.diff(path, back).total["u_rms"] == pytest.approx(report.total["u_rms"], rel=0.01)
    assert 0.5 * fraction < report.total["u_rms"] <= fraction


def test_the_largest_second_moments_of_an_optimizer_that_left_amsgrad_are_not_divided_by(tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt", amsgrad=True)
    content = torch.load(path, weights_only=True)
    content["optimizer"]["param_groups"][0]["amsgrad"] = False
    torch.save(content, path)
    with open_source(path) as source:
        assert {m.exp_avg_sq.rpartition(".")[2] for m in source.moments} == {"exp_avg_sq"}


def test_elements_without_an_update_do_not_hide_the_error_of_the_others(tmp_path: Path) -> None:
    """v = 0 where m is not: an update of m / eps, 10^5 times as large as any other."""
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    state = content["optimizer"]["state"][1]
    state["exp_avg"][3, :50], state["exp_avg_sq"][3, :50] = 1e-3, 0.0
    torch.save(content, path)
    report, back = restored(path, max_step_error=0.01, verify=True)
    quick, _ = restored(path, max_step_error=0.01)
    for total in (report.total, quick.total, statecodec.diff(path, back).total):
        assert total is not None
        assert 0.005 < total["u_rms"] <= 0.01
    (of_moment,) = (t.error for t in report.tensors if t.name == "optimizer.state.1.exp_avg")
    assert of_moment is not None
    assert 0.005 < of_moment["step_error"] <= 0.01


def test_moments_that_underflowed_are_exact(tmp_path: Path) -> None:
    """Adam in fp16: most second moments are too small for the dtype."""
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    content["model"] = {name: w.half() for name, w in content["model"].items()}
    for state in content["optimizer"]["state"].values():
        state["exp_avg"] = state["exp_avg"].half()
        state["exp_avg_sq"] = (state["exp_avg_sq"] * 1e-3).half()
    torch.save(content, path)
    report, back = restored(path)
    assert back.read_bytes() == path.read_bytes()
    assert any("exp_avg_sq is 0 where exp_avg is not" in note for note in report.notes)
    exact, _ = restored(path, preset="lossless")
    assert report.bytes <= exact.bytes * 1.02


def test_what_encoding_reports_is_what_comparing_finds(tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt")
    quick, _ = restored(path)
    checked, _ = restored(path, verify=True)
    assert quick.total is not None
    assert checked.total is not None
    for name, error in quick.total.items():
        assert error == pytest.approx(checked.total[name], rel=0.02), name
    for a, b in zip(quick.tensors, checked.tensors, strict=True):
        assert a.error == b.error


def test_size_falls_as_the_fraction_grows(tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt")
    sizes = [restored(path, max_step_error=f)[0].bytes for f in FRACTIONS]
    assert sizes == sorted(sizes, reverse=True)


def test_the_halves_are_separate(tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt")
    _, back = restored(path, preset="lossless", max_update_error=0.1)
    assert all(of_weight == 0.0 for _, of_weight in errors(path, back).values())
    _, back = restored(path, preset="lossless", max_weight_error=0.1)
    assert all(of_update == 0.0 for of_update, _ in errors(path, back).values())
    assert any(of_weight > 0.05 for _, of_weight in errors(path, back).values())


def test_own_rules_go_first(tmp_path: Path) -> None:
    report, _ = restored(trained(tmp_path / "ckpt.pt"), rules=["*1.weight:exp_avg=raw"], max_step_error=0.05)
    kept = {t.name: t.codec for t in report.tensors}
    assert kept["optimizer.state.1.exp_avg"] == "raw"
    assert kept["optimizer.state.0.exp_avg"].startswith("direction")


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1])
def test_beside_a_first_moment_of_ones_own_the_second_has_all_of_the_error(fraction: float, tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt")
    report, back = restored(path, rules=["exp_avg=raw"], max_update_error=fraction, preset="lossless", verify=True)
    largest = max(of_update for of_update, _ in errors(path, back).values())
    assert largest <= fraction
    assert largest > 0.5 * fraction or fraction == 0.001
    assert report.total is not None
    assert (report.total["u_rms"] == 0.0) == (fraction == 0.001)


@pytest.mark.parametrize("lr", [0.0, 1e-12])
def test_at_the_end_of_a_schedule_weights_keep_24_bits(lr: float, tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt", lr=lr)
    _, back = restored(path)
    a, b = (torch.load(p, weights_only=True)["model"] for p in (path, back))
    for name, w in a.items():
        assert float((b[name] - w).square().mean().sqrt()) <= 2.0**-17 * float(w.square().mean().sqrt())


def test_a_learning_rate_of_zero_counts_as_the_largest_of_the_file(tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    group = content["optimizer"]["param_groups"][0]
    frozen = {**group, "lr": 0.0, "params": group["params"][:2], "param_names": group["param_names"][:2]}
    rest = {**group, "params": group["params"][2:], "param_names": group["param_names"][2:]}
    content["optimizer"]["param_groups"] = [frozen, rest]
    torch.save(content, path)
    _, back = restored(path, max_step_error=0.1)
    assert 0.05 < errors(path, back)["0.weight"][1] <= 0.1002


def test_at_the_end_of_a_schedule_the_rate_counts_that_it_began_with(tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt", lr=0.0)
    content = torch.load(path, weights_only=True)
    content["optimizer"]["param_groups"][0]["initial_lr"] = LR
    torch.save(content, path)
    report, back = restored(path, max_step_error=0.1)
    assert 0.05 < errors(path, back)["0.weight"][1] <= 0.1002
    assert report.total is not None
    assert report.total["weight_step_error"] == pytest.approx(0.1, rel=0.1)


def test_weights_whose_steps_are_finer_than_24_bits_are_said_to_be_off_by_more(tmp_path: Path) -> None:
    """A promise that is not kept is not printed as if it were."""
    report, _ = restored(trained(tmp_path / "ckpt.pt", lr=1e-6), max_step_error=0.01)
    assert any("off by more than 1 % of a step" in note for note in report.notes)
    verified = statecodec.verify(report.path)
    assert "but weights in 24 bits up to" in str(verified)
    near, _ = restored(trained(tmp_path / "ckpt.pt"), max_step_error=0.1)
    assert not near.notes
    assert "but weights" not in str(near)


def test_moments_where_nothing_was_seen_stay_zero(tmp_path: Path) -> None:
    """Twenty rows of the embedding never had a gradient, and v = 0 with m != 0 is kept to a step of m / eps."""
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    state = content["optimizer"]["state"][0]
    state["exp_avg"][190, :5] = 1e-3
    torch.save(content, path)
    _, back = restored(path, max_step_error=0.3)
    found = torch.load(back, weights_only=True)["optimizer"]["state"][0]
    assert not found["exp_avg_sq"][180:].any()
    torch.testing.assert_close(found["exp_avg"][180:], state["exp_avg"][180:], rtol=1e-4, atol=0)
    assert bool((found["exp_avg_sq"] > 0).eq(state["exp_avg_sq"] > 0).all())


def _codecs(report: statecodec.Report) -> dict[str, str]:
    return {t.name: t.codec.split("(")[0] for t in report.tensors}


def test_momenta_and_lion(tmp_path: Path) -> None:
    for key in ("momentum_buffer", "exp_avg"):
        net, x = nn.Linear(96, 96), torch.randn(96, 96)
        state = {0: {key: x}, 1: {key: torch.randn(96)}}
        group = {"lr": 0.1, "momentum": 0.9, "params": [0, 1]}
        path = tmp_path / f"{key}.pt"
        torch.save({"model": net.state_dict(), "optimizer": {"state": state, "param_groups": [group]}}, path)
        report, back = restored(path, max_step_error=0.1)
        assert _codecs(report)[f"optimizer.state.0.{key}"] == "uniform"
        found = torch.load(back, weights_only=True)["optimizer"]["state"][0][key]
        assert 0.08 < float((found - x).square().mean().sqrt() / x.square().mean().sqrt()) <= 0.1002


class Lion(torch.optim.Optimizer):
    """As published, arXiv 2302.06675."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(m.lerp(p.grad, 1 - group["betas"][0]).sign_(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: Lion(p, lr=1e-4),
        lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.0),
        lambda p: torch.optim.Muon(p, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    ],
    ids=["sgd", "lion", "muon", "muon like adamw", "rmsprop", "rmsprop, centred"],
)
@pytest.mark.parametrize("lr", [None, 0.0], ids=["lr", "lr is 0"])
def test_weights_of_momenta_are_off_by_a_fraction_of_the_step_that_is_taken_next(
    make: Any, lr: float | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 192, bias=False), nn.Tanh(), nn.Linear(192, 64, bias=False))
    optimizer, target = make(net.parameters()), torch.randn(64, 96)

    def take_a_step() -> None:
        x = torch.randn(256, 96)
        optimizer.zero_grad()
        (net(x) - x @ target.T).square().mean().backward()
        optimizer.step()

    for _ in range(20):
        take_a_step()
    content = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    if lr is not None:  # of one of two groups, as of a part that is frozen
        group = content["optimizer"]["param_groups"][0]
        content["optimizer"]["param_groups"] = [group | {"params": [0], "lr": lr}, group | {"params": [1]}]
    torch.save(content, tmp_path / "ckpt.pt")
    before = {k: w.clone() for k, w in net.state_dict().items()}
    take_a_step()
    report, back = restored(tmp_path / "ckpt.pt", max_step_error=0.1)
    found = torch.load(back, weights_only=True)["model"]
    for name, w in net.state_dict().items():
        step, error = ((x - before[name]).square().mean().sqrt() for x in (w, found[name]))
        assert 0.05 < float(error / step) < 0.2, name
    assert {t.codec.split("(")[0] for t in report.tensors if t.role == "weight"} == {"uniform"}


def test_the_momentum_of_muon_is_finer(tmp_path: Path) -> None:
    """Orthogonalising makes small singular directions as large as all others, and their errors with them."""
    w = nn.Parameter(torch.randn(96, 96))
    optimizer = torch.optim.Muon([w])
    w.grad = torch.randn(96, 96)
    optimizer.step()
    torch.save({"model": {"w": w.detach()}, "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    report, _ = restored(tmp_path / "ckpt.pt", max_step_error=0.1)
    (momentum,) = (t for t in report.tensors if t.role == "momentum")
    assert momentum.error is not None
    assert 0.02 < momentum.error["step_error"] <= 0.03


@pytest.mark.parametrize("rule", ["raw", "dropped"])
def test_rules_for_moments_leave_the_weights_to_the_budget(rule: str, tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    _, back = restored(path, max_step_error=0.1, rules=[f"exp_avg={rule}", f"exp_avg_sq={rule}"])
    found = torch.load(back, weights_only=True)["model"]
    for index, (name, w) in enumerate(content["model"].items()):
        step = LR * rms(update(content["optimizer"]["state"][index]))
        error = rms((found[name].double() - w.double()).numpy()) / step
        assert 0.09 < error <= 0.1 if w.numel() >= 4096 else error == 0


@pytest.mark.parametrize("fraction", [0.01, 0.3])
def test_averages_of_weights_are_off_by_the_same_fraction_of_the_step_of_their_weights(
    fraction: float, tmp_path: Path
) -> None:
    """Against numpy: an average that moves far less than a step at a time is counted in that unit all the same."""
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    content["model_ema"] = {k: w + 1e-2 * torch.randn_like(w) for k, w in content["model"].items()}
    torch.save(content, path)
    report, back = restored(path, max_step_error=fraction)
    found = torch.load(back, weights_only=True)["model_ema"]
    told = {t.name: t.error for t in report.tensors}
    assert _codecs(report)["model_ema.0.weight"] == "following"
    for index, (name, x) in enumerate(content["model_ema"].items()):
        if x.numel() < 4096:
            assert torch.equal(found[name], x)
            continue
        step = LR * rms(update(content["optimizer"]["state"][index]))
        error = rms((found[name].double() - x.double()).numpy()) / step
        assert 0.9 * fraction < error <= fraction
        assert told[f"model_ema.{name}"]["step_error"] == pytest.approx(error, rel=1e-4)  # type: ignore[index]


SMALL = ((4095,), (1, 1, 2048), (31, 33), (5, 200))
LARGE = ((4096,), (32, 32), (16, 64), (64, 3, 3, 3), (10, 256))


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, lr=LR), lambda p: torch.optim.SGD(p, LR, momentum=0.9)]
)
def test_small_vectors_and_smaller_matrices_are_exact(make: Any, tmp_path: Path) -> None:
    """Weights, their averages and their moments, of two or of one; of all others none."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in SMALL + LARGE]
    optimizer = make(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        optimizer.step()
    model = {f"{i}.weight": p.detach() for i, p in enumerate(params)}
    average = {name: w + 1e-2 * torch.randn_like(w) for name, w in model.items()}
    saved = {"model": model, "model_ema": average, "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "ckpt.pt")
    report, back = restored(tmp_path / "ckpt.pt", max_step_error=0.01)
    found = torch.load(back, weights_only=True)
    assert report.total is not None
    for i, p in enumerate(params):
        same = [torch.equal(found[of][f"{i}.weight"], saved[of][f"{i}.weight"]) for of in ("model", "model_ema")]
        states = saved["optimizer"]["state"][i]
        same += [torch.equal(found["optimizer"]["state"][i][k], x) for k, x in states.items() if k != "step"]
        assert set(same) == {tuple(p.shape) in SMALL}, p.shape


def test_small_matrices_take_less_than_half_of_their_exact_size(tmp_path: Path) -> None:
    """A record for each of them, and its entries, included."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(16, 64) * 0.02) for _ in range(300)]
    optimizer = torch.optim.AdamW(params, lr=LR)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer.step()
    model = {f"{i}.weight": p.detach() for i, p in enumerate(params)}
    torch.save({"model": model, "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    report, _ = restored(tmp_path / "ckpt.pt")
    exact, _ = restored(tmp_path / "ckpt.pt", preset="lossless")
    assert report.bytes < exact.bytes / 2


def test_averages_are_exact_where_no_step_is_known_or_a_rule_says_so(tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    content["model_ema"] = {k: w + 1e-2 * torch.randn_like(w) for k, w in content["model"].items()}
    for kept, options in (({}, {"rules": ["ema=raw"]}), ({"optimizer": None}, {})):
        torch.save(content | kept, path)
        _, back = restored(path, max_step_error=0.3, **options) if not kept else restored(path, preset="small")
        found = torch.load(back, weights_only=True)["model_ema"]
        assert all(torch.equal(found[k], w) for k, w in content["model_ema"].items())


def test_without_a_learning_rate_weights_keep_24_bits(tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    for group in content["optimizer"]["param_groups"]:
        del group["lr"]
    torch.save(content, path)
    _, back = restored(path, max_step_error=0.3)
    for name, w in torch.load(back, weights_only=True)["model"].items():
        exact = content["model"][name]
        assert float((w - exact).square().mean().sqrt()) <= 2.0**-17 * float(exact.square().mean().sqrt())


def test_a_first_moment_of_factored_second_ones_is_no_step(tmp_path: Path) -> None:
    """Adafactor's, as transformers keeps it: what divides it is not known, so weights keep 24 bits."""
    w = torch.randn(96, 96)
    state = {
        "step": 5,
        "exp_avg": torch.randn(96, 96),
        "exp_avg_sq_row": torch.rand(96),
        "exp_avg_sq_col": torch.rand(96),
    }
    optimizer = {"state": {0: state}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"model": {"w": w}, "optimizer": optimizer}, tmp_path / "ckpt.pt")
    report, _ = restored(tmp_path / "ckpt.pt", max_step_error=0.1)
    assert _codecs(report) == {
        "model.w": "split", "optimizer.state.0.exp_avg": "uniform",
        "optimizer.state.0.exp_avg_sq_row": "raw", "optimizer.state.0.exp_avg_sq_col": "raw", "skeleton": "raw",
    }  # fmt: skip


@pytest.mark.parametrize("momentum", [True, False], ids=["timm's", "no momentum"])
def test_rmsprop_whose_step_is_not_known(momentum: bool, tmp_path: Path) -> None:
    """TensorFlow's way, as in timm, has the learning rate in the momentum; without one the gradient would be needed."""
    state = {"step": 5, "square_avg": torch.rand(96, 96)} | (
        {"momentum_buffer": torch.randn(96, 96)} if momentum else {}
    )
    optimizer = {"state": {0: state}, "param_groups": [{"lr": 0.1, "lr_in_momentum": True, "params": [0]}]}
    torch.save({"model": {"w": torch.randn(96, 96)}, "optimizer": optimizer}, tmp_path / "ckpt.pt")
    report, _ = restored(tmp_path / "ckpt.pt", max_step_error=0.1)
    assert _codecs(report)["model.w"] == "split"


def test_weights_that_nothing_trains_are_exact_and_unknown_ones_keep_24_bits(tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    content["model"]["frozen.weight"] = torch.randn(80, 80)
    torch.save(content, path)
    report, _ = restored(path)
    assert _codecs(report)["model.frozen.weight"] == "raw"
    torch.save({"w": torch.randn(80, 80)}, tmp_path / "alone.pt")
    report, _ = restored(tmp_path / "alone.pt")
    assert _codecs(report)["w"] == "split"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights are exact; moments have fewer bits to begin with, and lose no more than was asked for besides."""
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    content["model"] = {k: w.to(dtype) for k, w in content["model"].items()}
    for state in content["optimizer"]["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].to(torch.bfloat16)
    torch.save(content, path)
    report, back = restored(path, max_step_error=0.05, verify=True)
    found = torch.load(back, weights_only=True)
    assert all(torch.equal(found["model"][k], w) for k, w in content["model"].items())
    assert report.total is not None
    assert report.total["u_rms"] <= 0.052


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fraction", [0.001, 0.002, 0.003, 0.005, 0.01])
def test_moments_in_16_bits_are_off_by_what_the_file_says(fraction: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rounding what is decoded is a part of the error; where it is most of it, both moments stay exact."""
    path = trained(tmp_path / "ckpt.pt")
    content = torch.load(path, weights_only=True)
    for state in content["optimizer"]["state"].values():  # not so small, for fp16
        state["exp_avg"], state["exp_avg_sq"] = (
            (state["exp_avg"] * 64).to(dtype),
            (state["exp_avg_sq"] * 4096).to(dtype),
        )
    torch.save(content, path)
    report, back = restored(path, max_update_error=fraction, verify=True)
    found = torch.load(back, weights_only=True)["optimizer"]["state"]
    for index, state in content["optimizer"]["state"].items():
        told = next(t for t in report.tensors if t.name == f"optimizer.state.{index}.exp_avg")
        u, w = update(state), update(found[index])
        none = (state["exp_avg_sq"] == 0).numpy() & (abs(u) >= 1)  # m / eps
        error = math.sqrt(((w - u) ** 2).sum() / (u[~none] ** 2).sum())
        if state["exp_avg"].numel() < 4096 or (dtype == torch.bfloat16 and fraction <= 0.002):
            assert error == 0.0
            assert torch.equal(found[index]["exp_avg_sq"], state["exp_avg_sq"])
        else:
            assert error <= fraction * 1.002
            assert error > 0.5 * fraction or dtype == torch.float16  # whose second moments may be subnormal or 0
            assert told.error == {"step_error": pytest.approx(error, rel=0.01)}


def test_large_tensors_are_measured_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained(tmp_path / "ckpt.pt", width=256)
    whole, _ = restored(path, max_step_error=0.05)
    monkeypatch.setattr(step_size, "_PIECE", 1 << 10)
    report, _ = restored(path, max_step_error=0.05)
    assert whole.total is not None
    assert report.total == pytest.approx(whole.total, rel=1e-4)
    assert 0.045 < whole.total["u_rms"] <= 0.05


@pytest.mark.parametrize("share", [0.003, 0.02])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_an_embedding_whose_rows_are_trained_rarely_keeps_the_promise(
    optimizer: str, share: float, tmp_path: Path
) -> None:
    """Whatever a sample of its rows would say: here more of some evenly spread rows were trained than of the others."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 256, generator=generator) * 0.02
    trained_rows = torch.rand(4096, generator=generator) < share
    trained_rows[:: 4096 // 32] = True
    m = torch.randn(4096, 256, generator=generator) * 1e-4 * trained_rows[:, None]
    v = torch.full((4096, 256), 1e-8) * trained_rows[:, None]
    state: dict[str, Any] = {"momentum_buffer": m}
    group: dict[str, Any] = {"params": [0], "lr": LR, "momentum": 0.9}
    if optimizer == "adam":
        state, group = {"step": torch.tensor(30.0), "exp_avg": m, "exp_avg_sq": v}, {
            "params": [0], "lr": LR, "betas": BETAS, "eps": EPS,
        }  # fmt: skip
    content = {"model": {"emb": weight}, "optimizer": {"state": {0: state}, "param_groups": [group]}}
    torch.save(content, tmp_path / "ckpt.pt")
    _, back = restored(tmp_path / "ckpt.pt", max_step_error=0.05, verify=True)
    found = torch.load(back, weights_only=True)["optimizer"]["state"][0]
    if optimizer == "adam":
        error, of_weight = errors(tmp_path / "ckpt.pt", back)["emb"]
        assert 0.03 < of_weight <= 0.0501
    else:
        error = rms((found["momentum_buffer"] - m).numpy()) / rms(m.numpy())
    assert error <= 0.0501


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1.5, "much"])
def test_fractions_are_above_0_and_up_to_1(value: Any, tmp_path: Path) -> None:
    path = trained(tmp_path / "ckpt.pt", steps=1)
    for name in ("max_update_error", "max_weight_error", "max_step_error"):
        with pytest.raises(UsageError, match="fraction of an optimizer step"):
            statecodec.compress(path, **{name: value})


@pytest.mark.parametrize("name", ["max_update_error", "max_weight_error", "max_step_error"])
def test_a_budget_needs_something_to_bound(name: str, tmp_path: Path) -> None:
    torch.save({"codes": torch.arange(8192)}, tmp_path / "codes.pt")
    with pytest.raises(UsageError, match=name):
        statecodec.compress(tmp_path / "codes.pt", **{name: 0.01})


def test_a_promise_that_was_missed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, target = trained(tmp_path / "ckpt.pt", steps=2), tmp_path / "c.sc.safetensors"
    monkeypatch.setattr(Budget, "figures", {"u_rms": 0.005})  # while 0.01 is what tensors are encoded with
    statecodec.compress(path, target, max_update_error=0.01)
    with pytest.raises(VerificationFailed, match=r"is above the 0\.5 % that was asked for"):
        statecodec.verify(target, path)
    with pytest.raises(VerificationFailed, match=r"is above the 0\.5 % that was asked for"):
        statecodec.compress(path, tmp_path / "d.sc.safetensors", max_update_error=0.01, verify=True)
    assert not (tmp_path / "d.sc.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "preset", "asked", "words"),
    [
        (
            {},
            "resume",
            (0.01, 0.02),
            "preset resume, updates off by up to 1 % of a step, weights off by up to 2 % of a step",
        ),
        ({"max_step_error": 0.05}, None, (0.05, 0.05), "errors up to 5 % of a step"),
        (
            {"preset": "small", "max_weight_error": 0.01},
            "small",
            (0.1, 0.01),
            "preset small, updates off by up to 10 % of a step, weights off by up to 1 % of a step",
        ),
        ({"preset": "lossless"}, "lossless", (), "preset lossless"),
        ({"preset": "live"}, "live", (), "preset live"),
        ({"rules": ["exp_avg=raw"]}, "resume", (), "preset resume"),  # rules of one's own: the preset is no promise
    ],
    ids=str,
)
def test_a_file_says_what_was_asked_for(
    options: dict[str, Any], preset: str | None, asked: tuple[float, ...], words: str, tmp_path: Path
) -> None:
    path, target = trained(tmp_path / "ckpt.pt", steps=1), tmp_path / "c.sc.safetensors"
    promised = dict(zip(("u_rms", "weight_step_error"), asked, strict=False))
    made, seen = statecodec.compress(path, target, **options), statecodec.inspect(target)
    for report in (made, seen, statecodec.verify(target)):
        assert (report.preset, report.asked) == (preset, promised)
    assert words in str(seen)
    assert statecodec.inspect(path).asked is None


def test_what_was_asked_for_is_gone_once_a_file_is_converted(tmp_path: Path) -> None:
    path, first, second = (
        trained(tmp_path / "ckpt.pt", steps=1),
        tmp_path / "a.sc.safetensors",
        tmp_path / "b.safetensors",
    )
    statecodec.compress(path, first)
    report = statecodec.convert(first, second, "exp_avg=raw")
    assert (report.preset, report.asked) == (None, None)
    report = statecodec.convert(first, second, "nothing=raw", force=True)
    assert (report.preset, report.asked) == ("resume", {"u_rms": 0.01, "weight_step_error": 0.02})


def test_codes_per_octave() -> None:
    assert [codes_per_octave(f) for f in (0.01, 0.03, 0.1, 0.3, 1.0)] == [8, 5, 3, 2, 1]


@pytest.mark.parametrize("pack", ["zstd", "none"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [0.9, 1.0, 1.3, 1.7])
def test_values_that_do_not_spread_are_encoded_again(
    size: float, threads: int, pack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of two sizes alone may all lie in the middle between two multiples of the step that others would need."""
    for module in (chunking.iterate, chunking.chunks):
        monkeypatch.setattr(module, "__defaults__", (4096,))
    signs = torch.randn(100, 200, generator=torch.Generator().manual_seed(0)).sign()
    buffers = {i: {"momentum_buffer": signs * (size if i == 1 else i + 1) * 10**i} for i in range(3)}
    group = {"params": [0, 1, 2], "lr": 0.1, "momentum": 0.9}
    model = {f"w{i}": torch.randn(100, 200) for i in range(3)}
    torch.save({"model": model, "optimizer": {"state": buffers, "param_groups": [group]}}, tmp_path / "ckpt.pt")
    report, back = restored(tmp_path / "ckpt.pt", max_step_error=0.3, threads=threads, pack=pack)
    found = torch.load(back, weights_only=True)["optimizer"]["state"]
    for i, state in buffers.items():
        exact = state["momentum_buffer"].numpy()
        assert rms(found[i]["momentum_buffer"].numpy() - exact) <= 0.3 * rms(exact) * (1 + 1e-6)
    assert all(t.error["step_error"] <= 0.3 for t in report.tensors if t.role == "momentum" and t.error)


@pytest.mark.parametrize("size", [0.5, 0.61, 0.75, 0.999])
def test_a_finer_grid_is_found_in_a_few_tries(size: float) -> None:
    """Each value lies as far from the grid as it can: as far as `size` of half a step, whatever the step."""
    most, tries = 0.1, 0
    codec: Codec | None = Uniform(most * math.sqrt(12))
    while codec is not None:
        assert isinstance(codec, Uniform)
        last, error = codec, size * codec.step / 2
        codec = widths.finer(codec, most, Comparison(1.0, 50 * error**2, error, 0), 50)
        tries += 1
    assert size * last.step / 2 <= most
    assert tries <= 8
    assert last.step > 1.8 * most


@pytest.mark.parametrize("threads", [1, 3])
def test_a_large_parameter_is_measured_in_pieces(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_size, "_PIECE", 1000)
    with open_source(trained(tmp_path / "ckpt.pt")) as source:
        states = torch.load(source.path, weights_only=True)["optimizer"]["state"]
        pairs, nbytes = list(source.moments), sum(2 * source.tensors[m.exp_avg].nbytes for m in source.moments)
        meter = Meter(None, nbytes, "measuring the step")
        sizes = list(step_size.step_sizes(source, pairs, threads, meter))
    for size, state in zip(sizes, states.values(), strict=True):
        assert size is not None
        assert size.update == pytest.approx(rms(update(state)), rel=1e-6)
    assert meter.done == nbytes
