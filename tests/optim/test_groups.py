"""States that were saved from other groups: as a framework made them, by name, in any order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from statecodec import optim
from statecodec.errors import OptimizerError
from tests.optim.helpers import gradients, parameters, run


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.q_norm, self.norm = RMSNorm(), RMSNorm(), RMSNorm()
        self.normalizer = nn.Linear(8, 8, bias=False)  # not a norm
        self.attention, self.ln_1 = nn.Linear(8, 8), nn.LayerNorm(8)
        self.bias_table = nn.Parameter(torch.ones(4, 8))
        self.scale = nn.Parameter(torch.ones(8))


def model() -> nn.Module:
    made = nn.ModuleDict({"embed": nn.Embedding(9, 8), "block": Block(), "head": nn.Linear(8, 9, bias=False)})
    made["head"].weight = made["embed"].weight
    made["embed"].requires_grad_(True)
    made["block"].scale.requires_grad_(True)
    made["frozen"] = nn.Linear(8, 8).requires_grad_(False)
    return made


# Worked out by hand from the three frameworks' rules.
EXPECTED = {
    "transformers": [
        ["embed.weight", "block.scale", "block.normalizer.weight", "block.attention.weight"],
        ["block.bias_table", "block.input_layernorm.weight", "block.q_norm.weight", "block.norm.weight",
         "block.attention.bias", "block.ln_1.weight", "block.ln_1.bias"],
    ],
    "nanogpt": [
        ["embed.weight", "block.bias_table", "block.normalizer.weight", "block.attention.weight"],
        ["block.scale", "block.input_layernorm.weight", "block.q_norm.weight", "block.norm.weight",
         "block.attention.bias", "block.ln_1.weight", "block.ln_1.bias"],
    ],
    "timm": [
        ["block.scale", "block.input_layernorm.weight", "block.q_norm.weight", "block.norm.weight",
         "block.attention.bias", "block.ln_1.weight", "block.ln_1.bias"],
        ["embed.weight", "block.bias_table", "block.normalizer.weight", "block.attention.weight"],
    ],
}  # fmt: skip


@pytest.mark.parametrize("like", EXPECTED)
def test_groups_are_those_of_the_framework(like: str) -> None:
    for made in (model(), torch.compile(model(), backend="eager")):
        groups = optim.decay_groups(made, 0.1, like)
        assert [[name for name, _ in g["params"]] for g in groups] == EXPECTED[like]
        assert [g["weight_decay"] for g in groups] == ([0.0, 0.1] if like == "timm" else [0.1, 0.0])
        optim.AdamW(groups)
        torch.optim.AdamW(groups)


def test_an_unknown_framework_is_refused() -> None:
    with pytest.raises(OptimizerError, match="transformers, nanogpt, timm"):
        optim.decay_groups(model(), 0.1, "keras")


def framework_state(like: str = "transformers") -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A model, the state dict of torch's AdamW over the framework's unnamed groups, and its states by name."""
    made = model()
    groups = optim.decay_groups(made, 0.1, like)
    unnamed = [{**g, "params": [p for _, p in g["params"]]} for g in groups]
    theirs = torch.optim.AdamW(unnamed, lr=1e-2)
    for p in made.parameters():
        p.grad = torch.randn_like(p)
    theirs.step()
    return made, theirs.state_dict(), {name: theirs.state[p] for g in groups for name, p in g["params"]}


@pytest.mark.parametrize("like", EXPECTED)
def test_a_framework_s_state_loads_into_the_same_groups(like: str) -> None:
    made, state, by_name = framework_state(like)
    ours = optim.AdamW(optim.decay_groups(made, 0.3, like), moments="dense")
    ours.load_state_dict(state)
    assert ours.load_report.exact
    assert [g["weight_decay"] for g in ours.param_groups] == [g["weight_decay"] for g in state["param_groups"]]
    for name, p in made.named_parameters():
        if p.requires_grad:
            assert torch.equal(ours.state[p]["exp_avg"].decode(), by_name[name]["exp_avg"]), name


def test_a_framework_s_state_loads_into_any_groups_once_it_has_names() -> None:
    made, state, by_name = framework_state()
    trained = [(name, p) for name, p in made.named_parameters() if p.requires_grad]
    ours = optim.AdamW(trained, moments="dense", weight_decay=0.7, lr=5.0)
    with pytest.raises(OptimizerError, match="decay_groups"):
        ours.load_state_dict(state)
    before = copy.deepcopy(state["param_groups"])
    ours.load_state_dict(optim.with_names(state, optim.decay_groups(made, 0.1)))
    assert state["param_groups"] == before
    assert ours.load_report.exact
    for name, p in trained:
        assert torch.equal(ours.state[p]["exp_avg"].decode(), by_name[name]["exp_avg"]), name
    group = ours.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0.7)  # agreed on; and not
    assert "weight_decay" in str(ours.load_report)
    with pytest.raises(OptimizerError, match=r"\[4, 7\].*\[7, 4\]"):
        optim.with_names(state, optim.decay_groups(made, 0.1, "timm"))


def test_names_that_are_missing_or_unknown_are_reported() -> None:
    params = parameters()
    source = optim.AdamW(params.items())
    run(source, params, range(1))
    other = {**{k: p for k, p in parameters().items() if k != "a.bias"}, "new.weight": nn.Parameter(torch.ones(3, 3))}
    target = optim.AdamW([{"params": [pair]} for pair in other.items()])
    target.load_state_dict(source.state_dict())
    assert {(c.param, c.kind) for c in target.load_report.changes} == {("new.weight", "missing"), ("a.bias", "unused")}


def test_renamed_parameters_load_by_position_and_moved_ones_by_name() -> None:
    def saved(*names: str) -> dict[str, Any]:
        params = [nn.Parameter(torch.ones(3, 4)) for _ in names]
        source = optim.SGD(list(zip(names, params, strict=True)), lr=1.0, momentum=0.9)
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, i + 1.0)
        source.step()
        return source.state_dict()

    def loaded(state: dict[str, Any], *names: str) -> tuple[list[float], optim.LoadReport]:
        params = [nn.Parameter(torch.ones(3, 4)) for _ in names]
        target = optim.SGD(list(zip(names, params, strict=True)), momentum=0.9)
        target.load_state_dict(state)
        values = [target.state[p]["momentum_buffer"].decode() if p in target.state else None for p in params]
        return [0.0 if v is None else float(v.mean()) for v in values], target.load_report

    state = saved("a", "b", "c")
    assert loaded(state, "a", "b", "c")[0] == [1, 2, 3]
    assert loaded(state, "c", "a", "b")[0] == [3, 1, 2]
    values, report = loaded(state, "x", "y", "z")
    assert values == [1, 2, 3]
    assert "3 parameters are called otherwise; loaded by position: a into x" in str(report)
    assert loaded(state, "a", "new", "c")[0] == [1, 2, 3]
    values, report = loaded(state, "b", "c", "d")  # a layer went, one came: positions would mix all of them up
    assert values == [2, 3, 0]
    assert not report.exact


@given(st.data())
def test_states_follow_their_names_through_any_regrouping(data: st.DataObject) -> None:
    params = parameters()
    names = list(params)

    def grouping() -> list[list[str]]:
        order = data.draw(st.permutations(names))
        cuts = sorted(data.draw(st.sets(st.integers(1, len(names) - 1))))
        return [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]

    def named(values: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": [(n, values[n]) for n in group]} for group in grouping()]

    source = optim.AdamW(named(params), moments="dense")
    for k, g in gradients(0).items():
        params[k].grad = g
    source.step()
    others = parameters()
    target = optim.AdamW(named(others), moments="dense")
    target.load_state_dict(source.state_dict())
    assert target.load_report.exact
    for n in names:
        ours, theirs = (o.state[p[n]]["exp_avg"].decode() for o, p in ((target, others), (source, params)))
        assert torch.equal(ours, theirs)


def test_a_group_without_parameters_keeps_its_options() -> None:
    """A Trainer's second group, of a model that has no vectors: schedules want their keys in it as well."""

    def make() -> optim.AdamW:
        return optim.AdamW([{"params": [nn.Parameter(torch.ones(3, 4))]}, {"params": [], "weight_decay": 0.0}], lr=1e-3)

    source = make()
    torch.optim.lr_scheduler.LambdaLR(source, lambda step: 0.5)
    target = make()
    target.load_state_dict(source.state_dict())
    assert [(g["lr"], g["initial_lr"], g["weight_decay"]) for g in target.param_groups] == [
        (5e-4, 1e-3, 1e-2), (5e-4, 1e-3, 0.0)
    ]  # fmt: skip
