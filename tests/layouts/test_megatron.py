"""Megatron-LM's checkpoints, in the structure that it documents (megatron_files.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import statecodec
from statecodec.errors import MalformedCheckpoint
from statecodec.layouts import locate
from tests.contracts.layout import contents_of
from tests.layouts.megatron_files import (
    SETTINGS,
    SHAPES,
    distributed_optimizer,
    flat_buffer,
    legacy,
    masters,
    moments,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


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


def test_flat_buffers_of_a_distributed_optimizer(tmp_path: Path) -> None:
    """They are cut into parameters, so that no weight is stored twice; names are given to none of these."""
    distributed_optimizer(tmp_path / "run")
    source = locate(tmp_path / "run")
    assert source.framework == "Megatron-LM"
    assert {f.layout for f in source.files} == {"megatron", "opaque"}
    by_name = {t.name: t for t in source.tensors}
    shapes = [[by_name[name].shape for name in (m.exp_avg, m.exp_avg_sq, str(m.weight))] for m in source.moments]
    assert shapes == [[shape] * 3 for shape in reversed(SHAPES.values())]
    assert {(m.param, m.lr, m.beta2, m.step, m.weight_decay) for m in source.moments} == {(None, 1e-4, 0.95, 10, None)}
    assert {by_name[str(m.weight)].role for m in source.moments} == {"master"}
    report = statecodec.compress(tmp_path / "run", tmp_path / "x.sc.safetensors")
    assert (report.ratio or 0) > 3.3
    assert [t.codec for t in report.tensors if t.role == "weight" and t.bytes_before > 8192] == ["ulps"] * 5
    errors = [(t.error or {}).get("step_error", 9) for t in report.tensors if t.role == "master" and len(t.shape) == 2]
    assert len(errors) == 5
    assert max(errors) <= 0.0201
    restored_exactly(tmp_path)


def restored_exactly(folder: Path) -> None:
    """`lossless` gives back `run`; `resume` gives back its weights."""
    statecodec.compress(folder / "run", folder / "y.sc.safetensors", preset="lossless")
    statecodec.restore(folder / "y.sc.safetensors", folder / "exact")
    assert contents_of(folder / "exact") == contents_of(folder / "run")
    statecodec.restore(folder / "x.sc.safetensors", folder / "near")
    saved, back = (torch.load(next((folder / name).rglob("model_optim_rng.pt"))) for name in ("run", "near"))
    assert all(torch.equal(saved["model"][name], back["model"][name]) for name in SHAPES)


def test_another_order_than_the_documented_one_costs_bytes_only(tmp_path: Path) -> None:
    rank = distributed_optimizer(tmp_path / "run")
    documented = statecodec.compress(tmp_path / "run", tmp_path / "x.sc.safetensors").ratio
    torch.save({0: {torch.float32: flat_buffer(list(masters().values()))}}, rank / "distrib_optim.pt")
    assert len(locate(tmp_path / "run").moments) == len(SHAPES)
    other = statecodec.compress(tmp_path / "run", tmp_path / "x.sc.safetensors", force=True)
    assert len({t.codec for t in other.tensors if t.role == "weight" and t.bytes_before > 8192} - {"ulps"})
    assert (documented or 0) > (other.ratio or 0) > 2.5
    restored_exactly(tmp_path)


def test_parts_of_a_model_and_experts_have_buffers_of_their_own(tmp_path: Path) -> None:
    """Two interleaved stages of the same shapes; an optimizer for experts and one for the rest, in a list."""
    rank = distributed_optimizer(tmp_path)
    shapes = {"decoder.layers.0.mlp.experts.linear_fc1.weight0": (64, 65), **SHAPES}
    stages = [list(masters(shapes).values()) for _ in range(2)]
    saved = torch.load(rank / "model_optim_rng.pt")
    stage = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    saved |= {"model0": stage, "model1": {name: tensor.clone() for name, tensor in stage.items()}}
    del saved["model"]
    torch.save(saved, rank / "model_optim_rng.pt")
    dense = {number: {torch.float32: flat_buffer(stage[:0:-1])} for number, stage in enumerate(stages)}
    experts = {number: {torch.float32: flat_buffer(stage[:1])} for number, stage in enumerate(stages)}
    torch.save([dense, experts], rank / "distrib_optim.pt")
    source = locate(tmp_path)
    by_name = {t.name: t.shape for t in source.tensors}
    of_stage = [*reversed(SHAPES.values())]
    assert [by_name[str(m.weight)] for m in source.moments] == [*of_stage, *of_stage, (64, 65), (64, 65)]


@pytest.mark.parametrize(
    ("change", "pairs"),
    [
        (lambda model, buffer: model.pop("decoder.layers.0.mlp.linear_fc1.weight"), 1),  # a frozen one, say
        (lambda model, buffer: model.update(extra=torch.ones(64, 64).bfloat16()), 1),
        (lambda model, buffer: model.update(float_buffer=torch.ones(64, 64)), len(SHAPES)),
        (lambda model, buffer: buffer.update({k: torch.ones(1).expand(57920) for k in ("param", "exp_avg")}), 0),
        (lambda model, buffer: buffer.update(exp_avg=buffer["param"]), len(SHAPES)),
    ],
)
def test_what_does_not_fit_stays_flat(change: Any, pairs: int, tmp_path: Path) -> None:
    rank = distributed_optimizer(tmp_path / "run")
    model, flat = (torch.load(rank / name) for name in ("model_optim_rng.pt", "distrib_optim.pt"))
    (buffer,) = flat[0].values()
    change(model["model"], buffer)
    torch.save(model, rank / "model_optim_rng.pt")
    torch.save(flat, rank / "distrib_optim.pt")
    source = locate(tmp_path / "run")
    assert len(source.moments) == pairs
    statecodec.compress(tmp_path / "run", tmp_path / "x.sc.safetensors")
    statecodec.compress(tmp_path / "run", tmp_path / "y.sc.safetensors", preset="lossless")
    statecodec.restore(tmp_path / "y.sc.safetensors", tmp_path / "exact")
    assert contents_of(tmp_path / "exact") == contents_of(tmp_path / "run")


def test_many_buffers_are_not_each_cut_into_all_parameters(tmp_path: Path) -> None:
    """Two hundred buffers on one storage, and a model of two hundred weights: 40,000 windows, if all of them were."""
    rank = distributed_optimizer(tmp_path, {str(number): (64,) for number in range(200)})
    saved = torch.load(rank / "distrib_optim.pt")
    (buffer,) = saved[0].values()
    torch.save({number: dict(buffer) for number in range(200)}, rank / "distrib_optim.pt")
    (flat,) = [f for f in locate(tmp_path).files if f.path.endswith("distrib_optim.pt")]
    assert len(flat.views) < 2000


def test_buffers_in_buckets(tmp_path: Path) -> None:
    """Older versions keep a list of one tensor for each bucket under each key."""
    path = distributed_optimizer(tmp_path) / "distrib_optim.pt"
    saved = torch.load(path)
    (buffer,) = saved[0].values()
    cut = {key: list(buffer[key].split(buffer["param"].numel() // 3)) for key in ("param", "exp_avg", "exp_avg_sq")}
    torch.save({0: {torch.float32: {key: [t.clone() for t in of] for key, of in cut.items()}}}, path)
    found = locate(tmp_path).moments
    assert len(found) == len(cut["param"])
    shapes = {t.name: t.shape for t in locate(tmp_path).tensors}
    assert all(shapes[m.exp_avg] == shapes[m.exp_avg_sq] == shapes[str(m.weight)] for m in found)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(param=b["param"][:-1].clone()), lambda b: b.update(exp_avg=b["exp_avg"].view(2, -1)),
        lambda b: b.update(exp_avg_sq=b["exp_avg_sq"].long()), lambda b: b.pop("exp_avg_sq"),
        lambda b: b.update(numel_unpadded=[5]), lambda b: b.update(numel_unpadded=5), lambda b: b.update(param=[1, 2]),
    ],
)  # fmt: skip
def test_a_shard_that_lies_is_named(change: Any, tmp_path: Path) -> None:
    rank = distributed_optimizer(tmp_path / "run")
    saved = torch.load(rank / "distrib_optim.pt")
    change(next(iter(saved[0].values())))
    torch.save(saved, rank / "distrib_optim.pt")
    with pytest.raises(MalformedCheckpoint, match="distrib_optim"):
        locate(rank / "distrib_optim.pt")
    source = locate(tmp_path / "run")
    assert not source.moments
    assert any("distrib_optim" in str(file.note) for file in source.files)
    assert [t.role for t in source.tensors if t.param] == ["weight"] * len(SHAPES)  # the file beside it is sound
    statecodec.compress(tmp_path / "run", tmp_path / "x.sc.safetensors")
    statecodec.restore(tmp_path / "x.sc.safetensors", tmp_path / "back")
    assert contents_of(tmp_path / "back") == contents_of(tmp_path / "run")


def test_a_file_of_that_name_without_buffers_is_a_torch_file(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.randn(8, 64)}}, tmp_path / "distrib_optim.pt")
    (tensor,) = locate(tmp_path / "distrib_optim.pt").tensors
    assert (tensor.role, tensor.param, tensor.shape) == ("weight", "weight", (8, 64))


def test_a_container_that_is_there_many_times_is_walked_once(tmp_path: Path) -> None:
    """Two kilobytes, of which every path would take years."""
    inner: Any = {"x": torch.randn(1)}
    for _ in range(6):
        inner = dict.fromkeys(range(300), inner)
    torch.save(inner, tmp_path / "distrib_optim.pt")
    assert len(locate(tmp_path / "distrib_optim.pt").tensors) == 1
