"""SlimAdam's invariants, its rules, and the names that they must not be fooled by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from statecodec import optim
from statecodec.codecs import Raw, Shared
from statecodec.errors import OptimizerError
from statecodec.optim.slimadam import read_rules
from tests.optim.helpers import parameters, relative, run


def test_no_sharing_is_adamw() -> None:
    a, b = parameters(), parameters()
    run(optim.SlimAdam(a.items(), lr=1e-2, rules=None, decay_vectors=True), a, range(50))
    run(torch.optim.AdamW(b.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), b, range(50))
    assert all(relative(a[k], b[k]) < 1e-6 for k in a)


@pytest.mark.filterwarnings("ignore:SlimAdam rules that match no parameter")
def test_vectors_are_not_decayed() -> None:
    params = parameters()
    start = params["a.bias"].detach().clone()
    optimizer = optim.SlimAdam(params.items(), lr=1e-2, weight_decay=0.5)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(params["a.bias"].detach(), start)
    assert not torch.equal(params["a.weight"].detach(), parameters()["a.weight"].detach())


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_gradients_constant_along_the_shared_dimensions_are_adamw(dims: tuple[int, ...]) -> None:
    a, b = (nn.Parameter(torch.zeros(24, 70)) for _ in range(2))
    slim = optim.SlimAdam([("w", a)], lr=1e-2, weight_decay=0.0, rules={"w": dims})
    adam = torch.optim.AdamW([b], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    shape = [1 if d in dims else n for d, n in enumerate((24, 70))]
    for step in range(30):
        a.grad = b.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)).expand(24, 70).contiguous()
        slim.step()
        adam.step()
    assert relative(a, b) < 1e-5


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 2), (1, 2, 3), (0, 1, 2, 3)])
def test_shapes_bytes_and_permutations(dims: tuple[int, ...]) -> None:
    """The stored moment keeps shared dimensions as 1; permuting entries along them changes nothing."""
    shape, order = (6, 5, 3, 3), torch.randperm((6, 5, 3, 3)[dims[0]], generator=torch.Generator().manual_seed(0))
    states = []
    for permuted in (False, True):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = optim.SlimAdam([("w", p)], rules={"w": dims})
        g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        p.grad = g.index_select(dims[0], order) if permuted else g
        optimizer.step()
        states.append(optimizer.state[p]["exp_avg_sq"].parts["mean.data"])
    assert states[0].shape == tuple(1 if d in dims else n for d, n in enumerate(shape))
    assert torch.allclose(*states)
    assert torch.allclose(states[0], 0.05 * g.square().mean(dims, keepdim=True))


def test_wide_rows_and_many_tiles() -> None:
    """Tensors of many tiles, and rows longer than one, accumulate the same mean."""
    for shape in ((3000, 70), (3, 70_001)):
        for dims in ((0,), (1,)):
            p = nn.Parameter(torch.zeros(shape))
            optimizer = optim.SlimAdam([("w", p)], rules={"w": dims})
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            optimizer.step()
            found = optimizer.state[p]["exp_avg_sq"].parts["mean.data"]
            exact = 0.05 * p.grad.double().square().mean(dims, keepdim=True)
            assert relative(found, exact) < 1e-6
            assert torch.allclose(p.detach(), (-1e-3 * p.grad / (exact.float() / 0.05).sqrt()), atol=1e-8)


STATIC: list[tuple[str, tuple[int, ...] | None]] = [
    ("layers.0.self_attn.q_proj.weight", (1,)),
    ("layers.0.self_attn.k_proj.weight", (1,)),
    ("layers.0.self_attn.v_proj.weight", (0,)),
    ("layers.0.self_attn.o_proj.weight", (0,)),
    ("layers.0.mlp.up_proj.weight", (0,)),
    ("layers.0.mlp.gate_proj.weight", (0,)),
    ("layers.0.mlp.down_proj.weight", (0,)),
    ("embed_tokens.weight", (1,)),
    ("transformer.wte.weight", (1,)),
    ("lm_head.weight", (1,)),
    ("h.0.attn.qkv.weight", None),  # fused: "v.weight" would match as a substring
    ("h.0.attn.c_attn.weight", None),
    ("embedding_norm.weight", None),
    ("patch_embed.norm.weight", None),
]


@pytest.mark.filterwarnings("ignore:SlimAdam rules that match no parameter")
@pytest.mark.parametrize(("name", "dims"), STATIC)
def test_static_rules_match_whole_words(name: str, dims: tuple[int, ...] | None) -> None:
    p = nn.Parameter(torch.zeros(8, 8))
    optimizer = optim.SlimAdam([(name, p)])
    codec = optimizer.recipe(p, optimizer.param_groups[0]).specs["exp_avg_sq"].codec
    assert codec == (Raw() if dims is None else Shared(dims))


def test_vectors_are_never_shared() -> None:
    p = nn.Parameter(torch.zeros(8))
    optimizer = optim.SlimAdam([("h.0.v_proj.bias", p)], rules={"*": [0]})
    assert optimizer.recipe(p, optimizer.param_groups[0]).specs["exp_avg_sq"].codec == Raw()


def test_rules_files(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"rules": [{"pattern": "a.*", "dims": [1]}, {"pattern": "*", "dims": None}]}))
    params = parameters()
    optimizer = optim.SlimAdam(params.items(), rules=path)
    assert optimizer.param_groups[0]["rules"] == [["a.*", [1]], ["*", []]]
    run(optimizer, params, range(1))
    assert optimizer.state[params["a.weight"]]["exp_avg_sq"].codec == Shared((1,))
    assert optimizer.state[params["b.weight"]]["exp_avg_sq"].codec == Raw()
    broken: dict[str, Any] = {
        "list": [],
        "no dims": {"rules": [{"pattern": "a"}]},
        "dims": {"rules": [{"pattern": "a", "dims": [-1]}]},
    }
    for content in broken.values():
        path.write_text(json.dumps(content))
        with pytest.raises(OptimizerError):
            read_rules(path)


def test_a_rule_beyond_the_dimensions_is_refused() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    with pytest.raises(OptimizerError, match=r"rule for w: dimensions \[2\]"):
        optim.SlimAdam([("w", p)], rules={"w": [2]}).step()
