"""Names of wrapped models are those of the model, for everybody who reads names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from statecodec import SNRTracker, optim
from statecodec.choose.architectures import recognise
from statecodec.layouts.facts.survey import parameter_name
from statecodec.names import bare_name

WRAPPED = {
    "a.weight": "a.weight",
    "_orig_mod.a.weight": "a.weight",
    "module.a.weight": "a.weight",
    "module.module.a.weight": "a.weight",
    "_orig_mod.module.a.weight": "a.weight",
    "module._orig_mod.a.weight": "a.weight",
    "_forward_module.a.weight": "a.weight",
    "layers.0._checkpoint_wrapped_module.mlp.w1.weight": "layers.0.mlp.w1.weight",
    "_fsdp_wrapped_module.layers.3._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.bias": "layers.3.mlp.bias",
    "layers.0._orig_mod.attention.wq.weight": "layers.0.attention.wq.weight",
    # Words of the model itself, which only look like a wrapper's.
    "encoder.module.weight": "encoder.module.weight",
    "my_orig_mod.weight": "my_orig_mod.weight",
    "submodule.weight": "submodule.weight",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_bare_names(name: str) -> None:
    assert bare_name(name) == WRAPPED[name]
    assert parameter_name(name) == WRAPPED[name]
    assert bare_name(bare_name(name)) == bare_name(name)


def wrapped_in_everything() -> tuple[nn.Module, nn.Module]:
    """A model, and the same in torch.compile over activation checkpointing, with fresh gradients."""
    model = nn.ModuleDict({"embed": nn.Linear(8, 8), "q_proj": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)})
    for name in list(model):
        model[name] = checkpoint_wrapper(model[name])
    compiled = torch.compile(model, backend="eager")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model, compiled


def test_optimizers_choose_by_the_bare_name() -> None:
    _, compiled = wrapped_in_everything()
    named = dict(compiled.named_parameters())
    assert "_orig_mod.q_proj._checkpoint_wrapped_module.weight" in named
    muon = optim.Muon(named.items())
    muon.step()
    kinds = {bare_name(k): "momentum_buffer" in muon.state[p] for k, p in named.items()}
    assert [k for k, matrix in kinds.items() if matrix] == ["q_proj.weight"]
    slim = optim.SlimAdam(named.items(), rules={"q_proj.weight": [1]})
    slim.step()
    shared = [k for k, p in named.items() if slim.state[p]["exp_avg_sq"].codec.name == "shared"]
    assert list(map(bare_name, shared)) == ["q_proj.weight"]
    adamw = optim.AdamW(named.items(), moments="dense")
    adamw.step()
    tracker = SNRTracker(adamw, compiled.named_parameters())
    tracker.measure()
    assert {layer.name for layer in tracker.layers()} == {bare_name(k) for k in named}
    assert (
        recognise({k: tuple(p.shape) for k, p in named.items()})[
            "_orig_mod.lm_head._checkpoint_wrapped_module.weight"
        ].kind
        == "lm_head"
    )


def test_states_match_by_the_bare_name_whatever_wraps_the_model() -> None:
    model, compiled = wrapped_in_everything()
    saved = optim.AdamW(compiled.named_parameters())
    saved.step()
    params = {bare_name(k): p for k, p in model.named_parameters()}
    groups = [{"params": [(k, p) for k, p in params.items() if p.ndim == n]} for n in (1, 2)]
    again = optim.AdamW(groups)
    again.load_state_dict(saved.state_dict())
    assert again.load_report.exact


@pytest.mark.parametrize(
    ("rules", "match"),
    [({"q_proj.weight": [1], "k_proj.weight": [0]}, r"parameter: k_proj.weight; names are like embed.weight"),
     ("static", "all of the static ones")],
)  # fmt: skip
def test_a_rule_that_matches_nothing_warns(rules: object, match: str) -> None:
    names = ("embed.weight", "q_proj.weight") if rules != "static" else ("one.weight", "two.weight")
    params = [(n, nn.Parameter(torch.ones(8, 8))) for n in names]
    with pytest.warns(UserWarning, match=match):
        optim.SlimAdam(params, rules=rules)
    with pytest.warns(UserWarning, match="have no names"):
        optim.SlimAdam([p for _, p in params], rules=rules)
    optim.SlimAdam(params, rules={"*.weight": [1]})
    optim.SlimAdam(params, rules=None)
