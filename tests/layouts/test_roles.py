"""Roles, parameter names and moments on the layouts that frameworks write; and no name where none is certain."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import statecodec
from statecodec.layouts import locate
from tests.layouts.support import FoundFile, Net, found_files, split_groups, train


def trained(**options: Any) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(split_groups(model), lr=1e-3, betas=(0.8, 0.95), eps=1e-7, **options)
    train(model, optimizer)
    return model, optimizer


def expected_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names by optimizer index: the truth, by identity."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def by_name(file: FoundFile) -> dict[str, Any]:
    return {r.name: r for r in file.regions}


def test_nanogpt(saved: Any) -> None:
    model, optimizer = trained()
    compiled = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    state = {"model": compiled, "optimizer": optimizer.state_dict(), "best_val_loss": torch.tensor(2.0), "iter_num": 7}
    _, file = saved(state)
    regions = by_name(file)
    for i, name in enumerate(expected_names(model, optimizer)):
        for role in ("exp_avg", "exp_avg_sq", "step"):
            region = regions[f"optimizer.state.{i}.{role}"]
            assert (region.role, region.param) == (role, name)
    assert regions["model._orig_mod.wte.weight"].role == "weight"
    assert regions["model._orig_mod.wte.weight"].param == "wte.weight"
    assert regions["model._orig_mod.bn.running_mean"].role == "other"
    assert regions["model._orig_mod.bn.num_batches_tracked"].role == "other"
    assert regions["best_val_loss"].role == "other"
    assert "model._orig_mod.head.weight" not in regions  # tied: a view, not a region
    moments = {m.param: m for m in file.moments}
    assert set(moments) == set(expected_names(model, optimizer))
    found = moments["fc.weight"]
    assert (found.beta1, found.beta2, found.eps, found.lr, found.weight_decay, found.step) == (
        0.8,
        0.95,
        1e-7,
        1e-3,
        0.1,
        2.0,
    )
    assert moments["fc.bias"].weight_decay == 0.0
    assert found.weight == "model._orig_mod.fc.weight"


def test_lr_may_be_a_tensor(saved: Any) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25))
    train(model, optimizer)
    _, file = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert [m.lr for m in file.moments] == [0.25, 0.25]


def test_param_names_in_the_file_win(saved: Any) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4, bias=False) for _ in range(3)])
    named = list(model.named_parameters())[::-1]
    optimizer = torch.optim.AdamW(named)
    train(model, optimizer)
    _, file = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert [m.param for m in file.moments] == ["2.weight", "1.weight", "0.weight"]


def test_groups_that_could_be_dealt_in_two_ways_stay_anonymous(saved: Any) -> None:
    """All weights have one shape: which layers are in which group, shapes cannot tell."""
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4, bias=False) for _ in range(4)])
    params = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": [params[2], params[0]]}, {"params": [params[3], params[1]]}])
    train(model, optimizer)
    _, file = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert [m.param for m in file.moments] == [None] * 4
    assert {r.param for r in file.regions if r.role == "exp_avg"} == {None}
    assert {r.role for r in file.regions} == {"weight", "exp_avg", "exp_avg_sq", "step"}


def test_an_order_that_contradicts_the_shapes_stays_anonymous(saved: Any) -> None:
    shapes = [(4, 2), (4, 2), (2, 4), (2, 4)]
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    optimizer = torch.optim.AdamW([params[i] for i in (2, 0, 3, 1)])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    _, file = saved({"model": {f"w{i}": p for i, p in enumerate(params)}, "optimizer": optimizer.state_dict()})
    assert [m.param for m in file.moments] == [None] * 4


def test_frozen_layers_are_matched_only_where_unique(saved: Any) -> None:
    model, _ = trained()
    trained_params = [model.conv.weight, model.conv.bias]
    optimizer = torch.optim.AdamW(trained_params)
    train(model, optimizer)
    _, file = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    # conv.weight is the only one of its shape; conv.bias, bn.weight and bn.bias look alike
    assert [m.param for m in file.moments] in (["conv.weight", None], [None, None])


def test_lightning(saved: Any) -> None:
    model, optimizer = trained()
    state = {
        "epoch": 1,
        "state_dict": {f"net.{k}": v for k, v in model.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 3}],
        "loops": {"fit_loop": {"state": torch.zeros(2)}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": torch.tensor(1.0)}},
    }
    _, file = saved(state, name="last.ckpt")
    assert [m.param for m in file.moments] == [f"net.{n}" for n in expected_names(model, optimizer)]
    assert by_name(file)["loops.fit_loop.state"].role == "other"


def test_timm_with_an_ema(saved: Any) -> None:
    model, optimizer = trained()
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    state = {"arch": "x", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "state_dict_ema": ema}
    _, file = saved(state, name="last.pth.tar")
    assert [m.param for m in file.moments] == expected_names(model, optimizer)
    assert by_name(file)["state_dict_ema.fc.weight"].role == "ema"
    assert {m.weight for m in file.moments} == {f"state_dict.{n}" for n in expected_names(model, optimizer)}


def test_fsdp1_full_is_name_keyed(saved: Any) -> None:
    model, optimizer = trained()
    names = expected_names(model, optimizer)
    plain = optimizer.state_dict()
    groups = [{**g, "params": [names[i] for i in g["params"]]} for g in plain["param_groups"]]
    _, file = saved({"state": {names[i]: s for i, s in plain["state"].items()}, "param_groups": groups})
    assert [m.param for m in file.moments] == names
    assert by_name(file)["state.fc.weight.exp_avg"].param == "fc.weight"


def test_deepspeed_flat_partitions(saved: Any) -> None:
    flats = [torch.randn(100), torch.randn(20)]
    inner = torch.optim.AdamW([{"params": [f]} for f in flats], betas=(0.9, 0.95))
    for f in flats:
        f.grad = torch.randn_like(f)
    inner.step()
    state = {
        "optimizer_state_dict": {
            "loss_scaler": None,
            "single_partition_of_fp32_groups": flats,
            "base_optimizer_state": inner.state_dict(),
            "group_paddings": [0, 0],
        },
        "ds_version": "x",
    }
    _, file = saved(state)
    weights = [f"optimizer_state_dict.single_partition_of_fp32_groups.{i}" for i in range(2)]
    assert [(m.param, m.weight, m.beta2) for m in file.moments] == [(None, w, 0.95) for w in weights]
    assert [by_name(file)[w].role for w in weights] == ["master", "master"]


def test_deepspeed_module_views_share_a_storage(saved: Any) -> None:
    flat = torch.randn(24)
    _, file = saved({"module": {"a.weight": flat[:16].view(4, 4), "a.bias": flat[16:20], "b": flat[20:]}})
    assert [(r.param, r.shape, r.role, r.lossless) for r in file.regions] == [
        ("a.weight", (4, 4), "weight", False),
        ("a.bias", (4,), "weight", False),
        ("b", (4,), "weight", False),
    ]


def test_eight_bit_states_pass_through(saved: Any) -> None:
    state = {
        0: {
            "state1": torch.zeros(4, 4, dtype=torch.uint8),
            "absmax1": torch.ones(1),
            "qmap1": torch.ones(256),
            "step": 3,
        }
    }
    flash = {
        0: {
            "exp_avg::quantized": torch.zeros(16, dtype=torch.int8),
            "exp_avg::scales": torch.ones(1).half(),
            "step": torch.tensor(1),
        }
    }
    groups = [{"params": [0], "betas": (0.9, 0.999), "eps": 1e-8, "lr": 1e-3}]
    _, file = saved({"a": {"state": state, "param_groups": groups}, "b": {"state": flash, "param_groups": groups}})
    assert {r.name: r.role for r in file.regions if not r.name.endswith("step")} == {
        f"{prefix}.state.0.{key}": "other"
        for prefix, keys in (("a", ("state1", "absmax1", "qmap1")), ("b", ("exp_avg::quantized", "exp_avg::scales")))
        for key in keys
    }
    assert file.moments == ()


@pytest.mark.parametrize(
    ("make", "roles"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum"}),
        (lambda p: torch.optim.Muon(p), {"momentum"}),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"}),
        (lambda p: torch.optim.RMSprop(p), {"exp_avg_sq", "step"}),
        (lambda p: torch.optim.Adagrad(p), {"other", "step"}),
    ],
    ids=["sgd", "muon", "amsgrad", "rmsprop", "adagrad"],
)
def test_other_optimizers(saved: Any, make: Any, roles: set[str]) -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = make(model.parameters())
    train(model, optimizer)
    _, file = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert {r.role for r in file.regions if r.name.startswith("optimizer")} == roles
    assert {r.param for r in file.regions} == {"weight"}


def test_two_optimizers_over_one_model(saved: Any) -> None:
    model, _ = trained()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    pair = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(rest)]
    for optimizer in pair:
        train(model, optimizer)
    _, file = saved({"model": model.state_dict(), "optimizers": [o.state_dict() for o in pair]})
    assert [m.param for m in file.moments] == expected_names(model, pair[1])


def hugging_face(folder: Path) -> tuple[Net, torch.optim.AdamW]:
    model, optimizer = trained()
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "head.weight"}
    save_file(weights, folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return model, optimizer


def test_hugging_face_names_across_files(tmp_path: Path) -> None:
    """safetensors are sorted by name, so only shapes that settle it give names; none may be wrong."""
    model, optimizer = hugging_face(tmp_path)
    files = {f.path: f for f in found_files(locate(tmp_path))}
    assert {r.role for r in files["model.safetensors"].regions} == {"weight", "other"}
    truth = expected_names(model, optimizer)
    found = [m.param for m in files["optimizer.pt"].moments]
    assert all(f in (None, t) for f, t in zip(found, truth, strict=True))
    assert {"wte.weight", "conv.weight"} <= set(found)
    for moments in files["optimizer.pt"].moments:
        assert moments.weight == (f"model.safetensors:{moments.param}" if moments.param else None)


def test_accelerate_names_across_torch_files(tmp_path: Path) -> None:
    model, optimizer = trained()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    files = {f.path: f for f in found_files(locate(tmp_path))}
    assert [m.param for m in files["optimizer.bin"].moments] == expected_names(model, optimizer)


def test_checkpoints_side_by_side_keep_to_their_own_model(tmp_path: Path) -> None:
    for name, width in (("checkpoint-1", 4), ("checkpoint-2", 4)):
        model = torch.nn.Sequential(torch.nn.Linear(width, 3), torch.nn.Linear(3, width))
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer)
        (tmp_path / name).mkdir()
        torch.save({f"{name}.{k}": v for k, v in model.state_dict().items()}, tmp_path / name / "pytorch_model.bin")
        torch.save(optimizer.state_dict(), tmp_path / name / "optimizer.bin")
    for file in found_files(locate(tmp_path)):
        for moments in file.moments:
            assert moments.param is not None
            assert moments.param.startswith(file.path.split("/")[0])


# ---- oddities take nothing from what is beside them


def three_layers() -> tuple[torch.nn.Module, torch.optim.AdamW, list[str]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    return model, optimizer, [name for name, _ in model.named_parameters()]


def keys_as_text(state: dict[str, Any], names: list[str]) -> None:
    state["state"] = {str(k): v for k, v in state["state"].items()}


def all_ids_as_text(state: dict[str, Any], names: list[str]) -> None:
    keys_as_text(state, names)
    state["param_groups"][0]["params"] = [str(i) for i in state["param_groups"][0]["params"]]


def keys_are_names(state: dict[str, Any], names: list[str]) -> None:
    state["state"] = {names[k]: v for k, v in state["state"].items()}


def names_and_a_number(state: dict[str, Any], names: list[str]) -> None:
    keys_are_names(state, names)
    state["param_groups"][0]["params"] = [*names, 77]


def tuples_for_lists(state: dict[str, Any], names: list[str]) -> None:
    state["param_groups"][0]["params"] = tuple(state["param_groups"][0]["params"])
    state["param_groups"] = tuple(state["param_groups"])


def another_kind_of_group(state: dict[str, Any], names: list[str]) -> None:
    state["param_groups"].append("none")


def a_parameter_without_a_state(state: dict[str, Any], names: list[str]) -> None:
    state["param_groups"][0]["params"].append(77)


def an_id_that_is_none(state: dict[str, Any], names: list[str]) -> None:
    state["param_groups"][0]["params"].append(None)


def a_state_that_is_no_dict(state: dict[str, Any], names: list[str]) -> None:
    state["state"][99] = "nothing"


@pytest.mark.parametrize(
    "change",
    [keys_as_text, all_ids_as_text, keys_are_names, names_and_a_number, tuples_for_lists, another_kind_of_group,
     a_parameter_without_a_state, an_id_that_is_none, a_state_that_is_no_dict],
)  # fmt: skip
def test_odd_spellings_of_a_state_keep_moments_and_names(saved: Any, change: Any) -> None:
    model, optimizer, names = three_layers()
    state = optimizer.state_dict()
    change(state, names)
    _, file = saved({"model": model.state_dict(), "optimizer": state})
    assert [(m.param, m.beta2) for m in file.moments] == [(n, 0.999) for n in names]


def test_one_odd_state_is_anonymous_alone(saved: Any) -> None:
    """A shape that no weight has (a factored or folded state): the others are named as if it were not there."""
    model, optimizer, names = three_layers()
    state = optimizer.state_dict()
    state["state"][2].update(exp_avg=torch.zeros(7), exp_avg_sq=torch.zeros(7))
    _, file = saved({"model": model.state_dict(), "optimizer": state})
    assert [m.param for m in file.moments] == [n if i != 2 else None for i, n in enumerate(names)]


def test_one_odd_name_is_missing_alone(saved: Any) -> None:
    _, optimizer, names = three_layers()
    state = optimizer.state_dict()
    state["param_groups"][0]["param_names"] = [None if i == 2 else n for i, n in enumerate(names)]
    _, file = saved({"optimizer": state})
    assert [m.param for m in file.moments] == [n if i != 2 else None for i, n in enumerate(names)]


def test_a_key_that_is_no_text_leaves_the_model_its_weights(saved: Any) -> None:
    model, _, names = three_layers()
    _, file = saved({"model": {**model.state_dict(), 7: "version"}})
    assert [(r.param, r.role) for r in file.regions] == [(n, "weight") for n in names]


def test_states_that_no_group_refers_to_take_the_settings_that_all_groups_share(saved: Any) -> None:
    model, optimizer, _ = three_layers()
    state = optimizer.state_dict()
    state["state"] = {("p", k): v for k, v in state["state"].items()}
    state["param_groups"] += [{**state["param_groups"][0], "params": [], "lr": 1.0}]
    _, file = saved({"model": model.state_dict(), "optimizer": state})
    assert [(m.beta1, m.eps, m.lr) for m in file.moments] == [(0.9, 1e-8, None)] * 6


# ---- copies of weights


def test_an_average_is_a_weight_where_nothing_else_is(saved: Any) -> None:
    model, _, _ = three_layers()
    _, file = saved({"ema": model.state_dict(), "model": None})
    assert {r.role for r in file.regions} == {"weight"}


def test_averages_are_told_by_the_folder_they_are_in(tmp_path: Path) -> None:
    model, _, _ = three_layers()
    for folder in ("unet", "unet_ema"):
        (tmp_path / folder).mkdir()
        save_file(model.state_dict(), tmp_path / folder / "model.safetensors")
    roles = {f.path: {r.role for r in f.regions} for f in found_files(locate(tmp_path))}
    assert roles == {"unet/model.safetensors": {"weight"}, "unet_ema/model.safetensors": {"ema"}}


@pytest.mark.parametrize("kind", ["AveragedModel", "shadow_params", "Lightning"])
def test_averages_are_told_by_what_stands_beside_them(kind: str, tmp_path: Path) -> None:
    """torch's own; and files in the structure of diffusers' and of Lightning's, where the trained weights come last."""
    model, optimizer, _ = three_layers()
    weights = model.state_dict()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    contents: dict[str, dict[str, Any]] = {
        "AveragedModel": {"other.pt": averaged.state_dict(), "m.pt": {"model": weights}},
        "shadow_params": {"other.pt": {"decay": 0.9, "shadow_params": list(model.parameters())}, "m.pt": weights},
        "Lightning": {
            "m.pt": {
                "state_dict": weights, "current_model_state": {k: w.clone() for k, w in weights.items()},
                "averaging_state": {"n_averaged": torch.tensor(3)},
            }
        },
    }  # fmt: skip
    for name, content in contents[kind].items():
        torch.save(content, tmp_path / name)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    source = locate(tmp_path)
    roles = {t.name: t.role for t in source.tensors if t.role in ("weight", "ema")}
    assert Counter(roles.values()) == {"weight": 6, "ema": 6}
    assert {m.weight for m in source.moments} == {name for name, role in roles.items() if role == "weight"}
    (tmp_path / "m.pt").unlink()
    if kind != "Lightning":
        roles = {t.name: t.role for t in locate(tmp_path).tensors if t.name.startswith("other") and len(t.shape)}
        assert set(roles.values()) == {"weight"}, "where nothing else is"


@pytest.mark.parametrize("kind", ["an optimizer", "an average of its own"])
def test_a_file_called_ema_that_tells_itself_is_not_one_average(kind: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    more = {"optimizer": optimizer.state_dict()} if kind == "an optimizer" else {"ema": ema}
    torch.save({"model": model.state_dict(), **more}, tmp_path / "ema.pt")
    roles = {t.name: t.role for t in locate(tmp_path / "ema.pt").tensors}
    assert roles["model.fc.weight"] == "weight"
    assert roles.get("ema.fc.weight", "ema") == "ema"


def test_steps_are_no_weights_where_all_tensors_lie_in_one_dict(tmp_path: Path) -> None:
    save_file(
        {"model.fc.weight": torch.ones(4, 4), "optimizer.state.0.step": torch.tensor(3.0)}, tmp_path / "m.safetensors"
    )
    assert {t.name: t.role for t in locate(tmp_path / "m.safetensors").tensors} == {
        "model.fc.weight": "weight",
        "optimizer.state.0.step": "step",
    }


def test_words_that_only_contain_ema_are_no_averages(saved: Any) -> None:
    _, file = saved({"model": {"schema.weight": torch.ones(4, 4), "cinema.weight": torch.ones(2, 4)}})
    assert {r.role for r in file.regions} == {"weight"}


def test_every_parameter_is_counted_once(tmp_path: Path) -> None:
    """bf16 weights, their fp32 masters, an average, a copy in fp8 with its scale: one model of 216 parameters."""
    model, optimizer, _ = three_layers()
    low = {k: v.bfloat16() for k, v in model.state_dict().items()}
    fp8 = {"0.weight_fp8": low["0.weight"].to(torch.float8_e4m3fn), "0.weight_fp8_scale": torch.ones(8)}
    state = {
        "model": {**low, **fp8},
        "ema": {k: v.clone() for k, v in low.items()},
        "optimizer": {"optimizer": optimizer.state_dict(), "fp32_from_fp16_params": [list(model.parameters())]},
    }
    torch.save(state, tmp_path / "m.pt")
    report = statecodec.inspect(tmp_path / "m.pt")
    assert report.num_params == sum(p.numel() for p in model.parameters()) == 216
    counts = Counter(t.role for t in report.tensors)
    assert (counts["weight"], counts["ema"], counts["master"]) == (6, 6, 6)
    assert {t.role for t in report.tensors if "fp8" in t.name} == {"other"}


def test_weights_in_fp8_with_their_scales(saved: Any) -> None:
    weights = {"a.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
    _, file = saved({**weights, "norm.weight": torch.ones(8)})
    roles = {r.name: r.role for r in file.regions}
    assert roles == {"a.weight": "weight", "a.weight_scale_inv": "other", "norm.weight": "weight"}


def test_rules_for_weights_are_for_their_copies_too(tmp_path: Path) -> None:
    big = {k: torch.randn(64, 64) for k in ("weight", "ema")}
    torch.save({"model": {"fc.weight": big["weight"]}, "model_ema": {"fc.weight": big["ema"]}}, tmp_path / "m.pt")
    for rules, expected in ((["ema=raw", "weight=split"], "raw"), (["weight=split"], "split")):
        report = statecodec.compress(tmp_path / "m.pt", rules=rules, force=True)
        codecs = {t.role: t.codec.partition("(")[0] for t in report.tensors}
        assert (codecs["weight"], codecs["ema"]) == ("split", expected)
