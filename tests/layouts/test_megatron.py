"""Megatron-LM's checkpoints. It does not run without GPUs: files in its documented structure, written here.

Legacy: megatron/training/checkpointing.py and optimizer.Float16OptimizerWithFloat16Params.state_dict. Distributed:
core/dist_checkpointing, whose common.pt holds the optimizer's settings and whose DCP files hold its states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import statecodec
from statecodec.layouts import locate
from tests.contracts.layout import contents_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHAPES = {
    "embedding.word_embeddings.weight": (96, 64),
    "decoder.layers.0.input_layernorm.weight": (64,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (192, 64),
    "decoder.layers.0.self_attention.linear_qkv.bias": (192,),
    "decoder.layers.0.mlp.linear_fc1.weight": (256, 64),
    "decoder.layers.1.input_layernorm.weight": (64,),
    "decoder.layers.1.self_attention.linear_qkv.weight": (192, 64),
    "decoder.layers.1.self_attention.linear_qkv.bias": (192,),
    "decoder.layers.1.mlp.linear_fc1.weight": (256, 64),
}
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "bias_correction": True}


def masters() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.02 for name, shape in SHAPES.items()}


def moments(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"exp_avg": torch.randn_like(weight) * 1e-5, "exp_avg_sq": torch.rand_like(weight) * 1e-8 + 1e-12}


def legacy(folder: Path) -> dict[str, torch.Tensor]:
    """iter_0000010/mp_rank_00/model_optim_rng.pt: weights bf16, one group with weight decay and one without."""
    weights = masters()
    groups = [[n for n in weights if weights[n].dim() > 1], [n for n in weights if weights[n].dim() == 1]]
    numbers = {name: i for i, name in enumerate(n for group in groups for n in group)}
    inner = {
        "state": {i: moments(weights[name]) for name, i in numbers.items()},
        "param_groups": [
            {**SETTINGS, "weight_decay": decay, "step": 10, "params": [numbers[n] for n in group]}
            for group, decay in zip(groups, (0.1, 0.0), strict=True)
        ],
    }
    path = folder / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    optimizer = {"optimizer": inner, "fp32_from_fp16_params": [[weights[n] for n in group] for group in groups]}
    model = {name: weight.bfloat16() for name, weight in weights.items()}
    torch.save({"iteration": 10, "checkpoint_version": 3.0, "model": model, "optimizer": optimizer}, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return weights


def test_masters_have_the_names_of_their_weights(tmp_path: Path) -> None:
    weights = legacy(tmp_path)
    source = locate(tmp_path)
    roles: dict[str, dict[str | None, str]] = {}
    for tensor in source.tensors:
        roles.setdefault(tensor.role, {})[tensor.param] = tensor.name
    assert set(roles) == {"weight", "master", "exp_avg", "exp_avg_sq"}
    assert all(set(names) == set(weights) for names in roles.values())
    with statecodec.open(tmp_path) as checkpoint:
        for param, name in roles["master"].items():
            assert torch.equal(checkpoint.read(name), weights[str(param)])
    assert {m.param: m.weight for m in source.moments} == roles["master"]
    assert all((m.lr, m.step, m.beta2) == (1e-4, 10, 0.95) for m in source.moments)


def test_a_master_of_another_shape_is_nobodys(tmp_path: Path) -> None:
    legacy(tmp_path)
    path = next(tmp_path.rglob("*.pt"))
    saved = torch.load(path)
    saved["optimizer"]["fp32_from_fp16_params"][0][0] = torch.randn(64, 96)
    torch.save(saved, path)
    source = locate(tmp_path)
    assert None in {t.param for t in source.tensors if t.role == "master"}
    assert "embedding" in str({m.weight for m in source.moments})


def test_each_weight_is_stored_once(tmp_path: Path) -> None:
    legacy(tmp_path / "run")
    report = statecodec.compress(tmp_path / "run", tmp_path / "x.sc.safetensors", preset="resume")
    large = [t for t in report.tensors if t.role == "weight" and t.bytes_before > 8192]
    assert len(large) == 5
    assert {t.codec for t in large} == {"ulps"}
    stored = sum(t.bytes_after for t in report.tensors if len(t.shape) > 1)
    assert sum(t.bytes_before for t in report.tensors if len(t.shape) > 1) / stored > 3.3
    statecodec.compress(tmp_path / "run", tmp_path / "y.sc.safetensors", preset="lossless")
    statecodec.restore(tmp_path / "y.sc.safetensors", tmp_path / "back")
    assert contents_of(tmp_path / "back") == contents_of(tmp_path / "run")


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    """A folder of dist-ckpt: DCP under Megatron's names (layers stacked), and common.pt."""
    folder = tmp_path / "iter_0000010"
    state: dict[str, Any] = {}
    for name, shape in (
        ("decoder.layers.mlp.linear_fc1.weight", (2, 64, 64)),
        ("decoder.final_layernorm.weight", (64,)),
    ):
        weight = torch.randn(shape) * 0.02
        state[name] = weight.bfloat16()
        state |= {f"optimizer.state.{k}.{name}": v for k, v in {"fp32_param": weight, **moments(weight)}.items()}
    torch_dcp.save(state, checkpoint_id=folder)
    groups = [{**SETTINGS, "weight_decay": decay, "step": 10} for decay in (0.1, 0.0)]
    common = {"iteration": 10, "optimizer": {"optimizer": {"param_groups": groups}}, "content_metadata": {}}
    torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder


def test_settings_of_distributed_checkpoints_come_from_common_pt(distributed: Path) -> None:
    found = {m.param: m for m in locate(distributed).moments}
    assert set(found) == {"decoder.layers.mlp.linear_fc1.weight", "decoder.final_layernorm.weight"}
    for param, each in found.items():
        assert (each.lr, each.beta1, each.step, each.weight_decay) == (1e-4, 0.9, 10, None)
        assert each.weight == f"optimizer.state.fp32_param.{param}"
