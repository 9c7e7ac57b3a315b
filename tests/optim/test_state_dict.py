"""State dicts in every direction: our own, torch.optim's, another optimizer's, through files, hostile ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from statecodec import dtypes, optim
from statecodec.codecs import from_config
from statecodec.codecs.plain import from_plain, is_plain
from statecodec.errors import FormatError, OptimizerError, StatecodecError
from tests.contracts.optimizer import plain_only
from tests.optim.helpers import EVERY, bits, gradients, parameters, relative, run


def before(value: Any) -> Any:
    """A saved state as it was written when the plain form had four keys and codecs were of version 1.

    Rows then ran along the last dimension.
    """
    if is_plain(value):
        encoded = from_plain(value)
        config = first_version(encoded.codec.config())
        parts = from_config(config).encode(encoded.decode()).parts
        return {"codec": config, "shape": list(encoded.shape), "dtype": dtypes.name_of(encoded.dtype), "parts": parts}
    return {k: before(v) for k, v in value.items()} if isinstance(value, dict) else value


def first_version(config: dict[str, Any]) -> dict[str, Any]:
    config = {("steps" if k == "per_octave" else k): v for k, v in config.items() if k != "rows"}
    fields = {k: first_version(v) if isinstance(v, dict) else v for k, v in config.items()}
    return {**fields, "version": 1}


@pytest.mark.parametrize("name", ["adamw", "adamw-log4", "sgd", "lion", "foam-companded", "slimadam-companded", "muon"])
def test_states_written_before_still_load(name: str) -> None:
    """To the bit where a parameter has two dimensions; a convolution's are converted."""
    params = parameters()
    optimizer = EVERY[name](params.items())
    run(optimizer, params, range(5))
    saved = optimizer.state_dict()
    back = EVERY[name](parameters().items())
    back.load_state_dict({**saved, "state": {i: before(state) for i, state in saved["state"].items()}})
    again = back.state_dict()["state"]
    for i, p in enumerate(params.values()):
        if p.ndim < 3:
            assert bits(again[i]) == bits(saved["state"][i])
            continue
        for k, value in saved["state"][i].items():
            if is_plain(value):
                assert again[i][k].keys() == value.keys()
                assert relative(from_plain(again[i][k]).decode(), from_plain(value).decode()) < 0.3


@pytest.mark.parametrize("name", ["adamw", "adamw-dense", "adam", "foam", "slimadam", "lorapre"])
def test_dense_form_loads_into_torch_and_comes_back(name: str) -> None:
    params = parameters()
    optimizer = EVERY[name](params.items())
    run(optimizer, params, range(12))
    dense = optimizer.state_dict(dense=True)
    assert set(dense["param_groups"][0]) == set(torch.optim.AdamW(parameters().items()).state_dict()["param_groups"][0])
    cls = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    copies = {k: nn.Parameter(p.detach().clone()) for k, p in params.items()}
    theirs = cls(copies.items())
    theirs.load_state_dict(copy.deepcopy(dense))  # torch would step the tensors it is given
    assert theirs.param_groups[0]["lr"] == 1e-2
    run(theirs, copies, range(12, 14))
    back = EVERY[name](params.items())
    back.load_state_dict(dense)
    for i, p in enumerate(params.values()):
        ours = back.state_dict(dense=True)["state"][i]
        assert ours["step"] == 12
        for k in ("exp_avg", "exp_avg_sq"):
            assert ours[k].shape == p.shape
            # decoding and encoding again is nearly idempotent: codes stay, scales are on their grid
            assert relative(ours[k], dense["state"][i][k]) < 1e-3, (name, k)


@pytest.mark.parametrize("moments", ["dense", "companded8"])
def test_continuing_a_torch_run(moments: str) -> None:
    """20 steps of torch.optim.AdamW, then 20 of ours, against 40 of torch's.

    torch's cast leaves bf16 parameters untouched.
    """
    a, b = parameters(), parameters()
    theirs = torch.optim.AdamW(a.values(), lr=1e-2, weight_decay=0.1)
    run(theirs, a, range(20))
    ours = optim.AdamW(b.values(), lr=123.0, moments=moments, dense_below=0)
    with torch.no_grad():
        for k in b:
            b[k].copy_(a[k])
    start = {k: p.detach().clone() for k, p in b.items()}
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-2
    assert ours.param_groups[0]["weight_decay"] == 0.1
    assert all(s["step"] == 20 for s in ours.state.values())
    run(theirs, a, range(20, 40))
    run(ours, b, range(20, 40))
    bound = 1e-5 if moments == "dense" else 0.05
    assert all(relative(b[k] - start[k], a[k] - start[k]) < bound for k in a)
    if moments == "companded8":
        errors = [c.relative_rms for c in ours.load_report.changes]
        assert all(e is not None and 0 < e < 0.03 for e in errors)
        assert all(e < 0.03 for e in ours.load_report.update_rms.values())
        assert "relative rms error" in str(ours.load_report)
    else:
        assert ours.load_report.exact


@pytest.mark.parametrize(("name", "theirs"), [("sgd", torch.optim.SGD), ("muon", torch.optim.Muon)])
def test_dense_momentum_loads_into_torch(name: str, theirs: Any) -> None:
    matrices = ("a.weight", "b.weight")  # torch's Muon takes nothing else

    def step(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], at: int) -> None:
        for k, p in params.items():
            p.grad = gradients(at)[k]
        optimizer.step()

    params = {k: p for k, p in parameters().items() if k in matrices}
    optimizer = EVERY[name](params.items())
    step(optimizer, params, 0)
    saved = optimizer.state_dict(dense=True)
    copies = {k: nn.Parameter(p.detach().clone()) for k, p in params.items()}
    other = theirs(copies.items())
    assert set(saved["param_groups"][0]) >= set(other.state_dict()["param_groups"][0])
    other.load_state_dict(copy.deepcopy(saved))
    for i, p in enumerate(copies.values()):
        assert torch.equal(other.state[p]["momentum_buffer"], saved["state"][i]["momentum_buffer"])
    step(other, copies, 1)
    step(optimizer, params, 1)
    assert all(relative(copies[k].detach(), p.detach()) < 0.02 for k, p in params.items())


def test_continuing_torch_sgd_and_muon() -> None:
    a, b = parameters(), parameters()
    theirs = torch.optim.SGD(a.values(), lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.01)
    run(theirs, a, range(5))
    with torch.no_grad():
        for k in b:
            b[k].copy_(a[k])
    ours = optim.SGD(b.values(), lr=1.0, momentum=0.5, moments="dense")
    ours.load_state_dict(theirs.state_dict())
    run(theirs, a, range(5, 9))
    run(ours, b, range(5, 9))
    assert all(relative(b[k], a[k]) < 1e-6 for k in a)
    p = nn.Parameter(torch.randn(24, 70))
    muon = torch.optim.Muon([p], lr=1e-2)
    p.grad = torch.randn(24, 70)
    muon.step()
    ours_muon = optim.Muon([p], moments="dense")
    ours_muon.load_state_dict(muon.state_dict())
    assert ours_muon.param_groups[0]["adjust"] == "original", "which scales the step, and is torch's default"
    assert "adjust_lr_fn" not in ours_muon.param_groups[0]
    assert torch.equal(
        ours_muon.state_dict(dense=True)["state"][0]["momentum_buffer"], muon.state[p]["momentum_buffer"]
    )


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("source", ["adamw", "sgd", "lion", "foam", "slimadam", "lorapre", "muon", "torch"])
def test_any_optimizer_resumes_from_any_other(source: str, target: str) -> None:
    params = parameters(torch.bfloat16)
    made = torch.optim.AdamW(params.values(), lr=1e-2) if source == "torch" else EVERY[source](params.items())
    run(made, params, range(4))
    other = EVERY[target](params.items())
    lr = other.param_groups[0]["lr"]
    other.load_state_dict(made.state_dict())
    report = other.load_report
    if getattr(other, "algorithm", None) != getattr(made, "algorithm", None) and source != "torch":
        assert other.param_groups[0]["lr"] == lr
        assert any("hyperparameters stay" in note for note in report.notes)
    for change in report.changes:
        assert change.kind in ("encoded", "converted", "reset", "dropped")
        assert change.relative_rms is None or change.relative_rms < 3
    before = {k: p.detach().clone() for k, p in params.items()}
    run(other, params, range(4, 8))
    for k, p in params.items():
        assert p.isfinite().all()
        assert (p != before[k]).any()


def test_adamw_to_slimadam_keeps_what_sharing_keeps() -> None:
    params = parameters()
    source = optim.AdamW(params.items(), moments="dense")
    run(source, params, range(3))
    target = optim.SlimAdam(params.items(), rules={"a.weight": [1]})
    target.load_state_dict(source.state_dict())
    v = source.state_dict(dense=True)["state"][0]["exp_avg_sq"]
    assert torch.allclose(target.state[params["a.weight"]]["exp_avg_sq"].parts["mean.data"], v.mean(1, keepdim=True))
    changed = {(c.param, c.state): c.relative_rms for c in target.load_report.changes}
    assert changed["a.weight", "exp_avg"] == 0
    assert changed["a.weight", "exp_avg_sq"] == pytest.approx(relative(v.mean(1, keepdim=True).expand_as(v), v))
    assert target.load_report.update_rms["a.weight"] > 0.05
    assert not target.load_report.exact


def test_changing_the_storage_of_the_same_optimizer() -> None:
    params = parameters(torch.bfloat16)
    wide = optim.AdamW(params.values(), moments="dense", master_weights="split32", lr=3e-3)
    run(wide, params, range(5))
    exact = {k: wide.master_weight(p) for k, p in params.items()}
    narrow = optim.AdamW(params.values(), dense_below=0)
    narrow.load_state_dict(wide.state_dict())
    assert narrow.param_groups[0]["lr"] == 3e-3
    assert narrow.param_groups[0]["moments"] == "companded8"
    for k, p in params.items():
        assert narrow.state[p]["weight_low"].parts["data"].dtype == torch.int8
        assert relative(narrow.master_weight(p), exact[k]) < 2.0**-16
    back = optim.AdamW(params.values(), moments="dense", master_weights="split32")
    back.load_state_dict(narrow.state_dict())
    for p in params.values():
        assert torch.equal(back.master_weight(p), narrow.master_weight(p))


def test_hooks_see_plain_values() -> None:
    params = parameters()
    optimizer = EVERY["adamw"](params.items())
    run(optimizer, params, range(1))
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": plain_only(s)})
    state = optimizer.state_dict()
    assert seen == ["pre"]
    assert state.pop("extra") is True
    optimizer.register_load_state_dict_pre_hook(
        lambda o, s: {**s, "param_groups": [{**s["param_groups"][0], "lr": 7.0}]}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("post"))
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 7.0
    assert seen == ["pre", "post"]


def test_a_schedule_still_holds_the_groups_after_loading() -> None:
    params = parameters()
    optimizer = EVERY["adamw"](params.items())
    group = optimizer.param_groups[0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0] is group


def of(state: dict[str, Any]) -> dict[str, Any]:
    """The parts of an encoded first moment."""
    (parts,) = state["state"][0]["exp_avg"].values()
    return parts


def rename(old: str, new: str) -> Any:
    """Says something else of an encoded first moment."""
    return lambda s: s["state"][0].update(exp_avg={k.replace(old, new): v for k, v in s["state"][0]["exp_avg"].items()})


BROKEN: dict[str, tuple[type[StatecodecError], Any]] = {
    "no groups": (OptimizerError, lambda s: s.pop("param_groups")),
    "groups of a number": (OptimizerError, lambda s: s.update(param_groups=3)),
    "another number of parameters": (OptimizerError, lambda s: s["param_groups"][0]["params"].pop()),
    "another number of groups": (OptimizerError, lambda s: s["param_groups"].append(s["param_groups"][0])),
    "state of a list": (OptimizerError, lambda s: s.update(state=[1])),
    "a state of a string": (OptimizerError, lambda s: s["state"][0].update(exp_avg="x")),
    "a tensor of another size": (OptimizerError, lambda s: s["state"][0].update(exp_avg=torch.zeros(3))),
    "a missing part": (FormatError, lambda s: of(s).pop("scales")),
    "a part of another dtype": (FormatError, lambda s: of(s).update(codes=torch.zeros(24, 70, dtype=torch.int16))),
    "an unknown codec": (StatecodecError, rename("companded", "evil")),
    "another shape": (FormatError, rename("24,70", "70,24")),
    "a negative lr": (OptimizerError, lambda s: s["param_groups"][0].update(lr=-1.0)),
    "betas of one": (OptimizerError, lambda s: s["param_groups"][0].update(betas=(1.0, 1.0))),
    "a low part of floats": (OptimizerError, lambda s: s["state"][0].update(weight_low=torch.zeros(24, 70))),
    "a step of a string": (OptimizerError, lambda s: s["state"][0].update(step="three")),
    "an infinite dense moment": (
        StatecodecError, lambda s: s["state"][0].update(exp_avg=torch.full((24, 70), torch.inf)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_state_is_refused_and_changes_nothing(what: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = EVERY["adamw"](params.items())
    run(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    error, damage = BROKEN[what]
    damage(state)
    before = bits(optimizer.state_dict())
    with pytest.raises(error):
        optimizer.load_state_dict(state)
    assert bits(optimizer.state_dict()) == before


def test_full_precision_weights_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 30))
    exact[2].weight = nn.Parameter(exact[0].weight.detach().T.contiguous())
    model = copy.deepcopy(exact).to(torch.bfloat16)
    optimizer = optim.AdamW(model.parameters(), master_weights="split32")
    optim.load_fp32_state_dict(model, optimizer, exact.state_dict())
    masters = optim.fp32_state_dict(model, optimizer)
    assert masters.keys() == exact.state_dict().keys()
    for k, v in exact.named_parameters():
        assert torch.equal(masters[k], v.detach()), k
    with pytest.raises(OptimizerError, match="differ in 1 names"):
        optim.load_fp32_state_dict(model, optimizer, {**exact.state_dict(), "more": torch.zeros(1)})
    with pytest.raises(OptimizerError, match="other shapes"):
        optim.load_fp32_state_dict(model, optimizer, {**exact.state_dict(), "0.bias": torch.zeros(1)})


def test_torch_s_moments_written_into_the_state_are_encoded_with_a_word() -> None:
    params = parameters()
    optimizer = EVERY["adamw"](params.items())
    run(optimizer, params, range(2))
    p = params["a.weight"]
    exact = torch.randn(24, 70, generator=torch.Generator().manual_seed(0))
    optimizer.state[p] = {"step": torch.tensor(5), "exp_avg": exact, "exp_avg_sq": exact.square()}
    with pytest.warns(UserWarning, match=r"a\.weight: exp_avg encoded .* relative rms error"):
        state = optimizer.ensure_state(p, optimizer.param_groups[0])
    assert int(state["step"]) == 5
    assert relative(state["exp_avg"].decode(), exact) < 0.02
    run(optimizer, params, range(2, 3))  # and no second word


def test_a_low_part_that_says_nothing_any_more_is_dropped_with_a_word() -> None:
    """Cast and changed besides: the low part was of another weight."""
    params = parameters(torch.bfloat16)
    optimizer = EVERY["adamw"](params.items())
    run(optimizer, params, range(2))
    p = params["a.weight"]
    p.data, p.grad = p.data.float() * 1.01, None
    before = p.detach().clone()
    with pytest.warns(UserWarning, match=r"a\.weight was cast to torch\.float32 and changed besides"):
        assert torch.equal(optimizer.master_weight(p), before)
    assert "weight_low" not in optimizer.state[p]
