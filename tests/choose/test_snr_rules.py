"""Rules: the published figures from the published SNRs, files that both readers take, transfer to other sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from statecodec import codecs
from statecodec.checkpoint.base import TensorInfo
from statecodec.choose import Policy, load_rules
from statecodec.choose.architectures import recognise
from statecodec.choose.snr import LayerSNR, kept, saved
from statecodec.choose.snr_rules import chosen, read_table, rules_document, saved_curve, types, write_rules
from statecodec.dtypes import FLOAT32
from statecodec.errors import PolicyError
from statecodec.optim import SlimAdam
from statecodec.optim.slimadam import read_rules

DATA = Path(__file__).parent / "data"
EXCEPTIONS = {
    "transformer.h.2.attn.q_proj.weight": (), "transformer.h.3.attn.q_proj.weight": (0,),
    "transformer.h.9.mlp.mlp_up.weight": (1,), "transformer.h.10.mlp.mlp_up.weight": (1,),
    "transformer.h.11.mlp.mlp_up.weight": (1,),
}  # fmt: skip


@pytest.mark.parametrize(("lr", "share"), [("0.0003", 99.40), ("0.003", 38.5)])
def test_published_figures_at_cutoff_one(lr: str, share: float) -> None:
    layers = read_table(DATA / f"slimadam_gpt2_lr{lr}.csv")
    assert sum(x.numel for x in layers) == 124_373_760
    assert 100 * saved(layers, chosen(layers)) == pytest.approx(share, abs=0.05)
    if lr == "0.0003":
        assert sum(kept(x.shape, chosen(layers)[x.name]) for x in layers) == 749_440


def test_published_rules() -> None:
    """The rules shipped with the paper (rules/slimadam_C1.0_rules.json): its table, with these exceptions."""
    layers = read_table(DATA / "slimadam_gpt2_lr0.0003.csv")
    known = recognise({layer.name: layer.shape for layer in layers})
    dims = chosen(layers)
    other = {x.name: dims[x.name] for x in layers if x.shareable and dims[x.name] != known[x.name].recommended}
    assert other == EXCEPTIONS


def test_the_curve_falls_from_all_to_nothing() -> None:
    layers = read_table(DATA / "slimadam_gpt2_lr0.003.csv")
    curve = saved_curve(layers)
    shares = [share for _, share in curve]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert shares[-1] == 0.0
    assert dict(curve)[1.0] == pytest.approx(0.385, abs=5e-4)


def model(depth: int, width: int, noisy: int | None = None) -> list[LayerSNR]:
    layers = [LayerSNR("wte.weight", (100, width), {(0,): 0.1, (1,): 3.0, (0, 1): 0.1})]
    for i in range(depth):
        own = {(0,): 4.0, (1,): 0.5, (0, 1): 0.4} if i != noisy else {(0,): 0.2, (1,): 0.1, (0, 1): 0.1}
        layers.append(LayerSNR(f"h.{i}.v_proj.weight", (width, width), own))
        layers.append(LayerSNR(f"h.{i}.up_proj.weight", (4 * width, width), {(0,): 0.2, (1,): 0.3, (0, 1): 0.1}))
        layers.append(LayerSNR(f"h.{i}.ln.weight", (width,), {(0,): 50.0}, shareable=False))
    return layers


def test_one_file_serves_compress_and_the_optimizer(tmp_path: Path) -> None:
    layers = model(3, 8)
    path = tmp_path / "rules.json"
    write_rules(rules_document(layers), path)
    policy = Policy(load_rules(path))
    optimizer_rules = {pattern: tuple(dims) for pattern, dims in read_rules(str(path))}
    assert optimizer_rules["h.*.v_proj.weight"] == (0,)
    for layer in layers:
        expected = chosen(layers, basis="type")[layer.name]
        moment = TensorInfo("optimizer.state.0.exp_avg_sq", "exp_avg_sq", layer.name, layer.shape, FLOAT32)
        codec = policy.encoding_for(moment).codec
        assert codec == (codecs.Shared(expected) if expected else codecs.Raw()), layer.name
        # The parameter of that name itself, and its first moment, are not touched.
        for role, name in (("weight", layer.name), ("exp_avg", "optimizer.state.0.exp_avg")):
            assert policy.rule_for(TensorInfo(name, role, layer.name, layer.shape, FLOAT32)) is None


def test_type_rules_transfer_to_another_depth_and_width(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    write_rules(rules_document(model(2, 8)), path)
    names = [(x.name, torch.nn.Parameter(torch.randn(x.shape))) for x in model(5, 16)]
    optimizer = SlimAdam(names, rules=str(path))
    for _, p in names:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in names:
        codec = optimizer.state[p]["exp_avg_sq"].codec
        expected = {"v_proj": codecs.Shared((0,)), "wte": codecs.Shared((1,))}
        assert codec == expected.get(name.split(".")[-2], codecs.Raw()), name


def test_depth_average_and_single_layers_differ() -> None:
    layers = model(4, 8, noisy=2)
    assert chosen(layers, basis="layer")["h.2.v_proj.weight"] == ()
    assert chosen(layers, basis="type")["h.2.v_proj.weight"] == (0,)  # (3 * 4.0 + 0.2) / 4 is above 1
    by_layer = rules_document(layers, basis="layer")
    assert {e["pattern"]: e["dims"] for e in by_layer["rules"]}["h.2.v_proj.weight"] == []
    assert by_layer["saved"] < rules_document(layers)["saved"]


def test_patterns_that_catch_too_much_are_corrected() -> None:
    """`h.*.w` also matches `h.0.moe.1.w`: the more special pattern stands first, and exact rules where that fails."""
    layers = [
        LayerSNR("h.0.w", (4, 4), {(0,): 2.0}), LayerSNR("h.0.moe.1.w", (4, 4), {(1,): 2.0}),
        LayerSNR("h.0.three", (2, 2, 2), {(2,): 2.0}), LayerSNR("h.1.three", (2, 2), {(0,): 2.0}),
    ]  # fmt: skip
    document = rules_document(layers)
    from fnmatch import fnmatchcase

    for layer in layers:
        first = next(e for e in document["rules"] if fnmatchcase(layer.name, e["pattern"]))
        assert tuple(first["dims"]) == chosen(layers, basis="type")[layer.name], layer.name


def test_infinite_ratios_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    write_rules(rules_document([LayerSNR("a.w", (4, 4), {(0,): math.inf})]), path)
    assert json.loads(path.read_text())["rules"][0]["dims"] == [0]
    assert [p.name for p in tmp_path.iterdir()] == ["rules.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,shape\na,(1)", "columns"),
        ("key,shape,compress_dims,snr\n", "empty"),
        ('key,shape,compress_dims,snr\na,"(2, 2)","(2,)",1', "dimensions"),
        ('key,shape,compress_dims,snr\na,"(2, 2)","(0,)",x', "line 2"),
        ('key,shape,compress_dims,snr\na,__import__("os"),"(0,)",1', "expected numbers in brackets"),
        ('key,shape,compress_dims,snr\na,"(2, 2)","(0,)",1\na,"(2, 3)","(0,)",1', "had shape"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "snr.csv"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message):
        read_table(path)


def test_steps_of_a_table_are_averaged(tmp_path: Path) -> None:
    path = tmp_path / "snr.csv"
    path.write_text('step,key,shape,compress_dims,snr\n1,a,"(2, 2)","(0,)",1\n2,a,"(2, 2)","(0,)",2\n')
    assert read_table(path)[0].ratios == {(0,): 1.5}


def test_unknown_basis() -> None:
    with pytest.raises(PolicyError, match="layer, type, table"):
        chosen(model(1, 4), basis="moon")
    assert len(types(model(3, 4))) == 4
