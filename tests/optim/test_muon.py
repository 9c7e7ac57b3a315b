"""Newton-Schulz, and who gets Muon."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from statecodec import optim
from statecodec.optim.hidden_matrix import is_hidden_matrix
from statecodec.optim.muon import newton_schulz
from tests.optim.helpers import EVERY, parameters, run


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (4, 12, 12), (1, 9)])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_singular_values_become_one(shape: tuple[int, ...], scale: float) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    x = (u * torch.linspace(1, 0.1, u.shape[-1])) @ vh * scale
    y = newton_schulz(x, 5)
    values = torch.linalg.svdvals(y)
    assert y.shape == x.shape
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25
    assert float((y * (u @ vh)).sum() / (y.norm() * (u @ vh).norm())) > 0.98


def test_a_zero_matrix_stays_zero() -> None:
    assert not newton_schulz(torch.zeros(3, 4)).any()


NAMES = {
    "layers.0.attn.q_proj.weight": True, "encoder.layer.0.attention.output.dense.weight": True,
    "features.3.weight": True, "model.embed_tokens.weight": False, "transformer.wte.weight": False,
    "wpe.weight": False, "lm_head.weight": False, "output.weight": False, "heads.head.weight": False,
    "classifier.weight": False, "pos_embedding": False, "patch_embed.proj.weight": False, "headroom.weight": True,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_hidden_matrices_by_name(name: str) -> None:
    matrix, group = nn.Parameter(torch.zeros(4, 6)), {"matrix": None}
    assert is_hidden_matrix(matrix, name, group) == NAMES[name]
    assert is_hidden_matrix(matrix, name, {"matrix": True})
    assert not is_hidden_matrix(matrix, name, {"matrix": False})
    assert not is_hidden_matrix(nn.Parameter(torch.zeros(4)), name, {"matrix": True})


def test_adam_lr_ratio_scales_only_what_adam_steps() -> None:
    results = []
    for ratio in (1.0, 0.5):
        params = parameters()
        run(
            optim.Muon(params.items(), lr=1e-2, weight_decay=0.0, adam_lr_ratio=ratio, moments="dense"),
            params,
            range(1),
        )
        start = parameters()
        results.append({k: (params[k] - start[k]).detach() for k in params})
    assert torch.allclose(results[1]["a.bias"], results[0]["a.bias"] * 0.5, rtol=1e-4)
    assert torch.equal(results[1]["a.weight"], results[0]["a.weight"])


def test_states_by_kind() -> None:
    params = parameters()
    optimizer = EVERY["muon"](params.items())
    run(optimizer, params, range(1))
    assert "momentum_buffer" in optimizer.state[params["conv.weight"]]
    assert "exp_avg_sq" in optimizer.state[params["embed.weight"]]
