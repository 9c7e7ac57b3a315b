"""Names where the model's order is known from its architecture: the right one or none, whatever the optimizer holds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from statecodec.layouts import list_memory
from statecodec.layouts.facts.orders import known_orders
from statecodec.layouts.locate import locate_listing

E, V = 4, 9
Shapes = dict[str, tuple[int, ...]]


def gpt2(layers: int, *, head: str | None = None) -> Shapes:
    """Parameters of GPT-2 in the order of `named_parameters()`, with transformers' shapes."""
    shapes: Shapes = {"transformer.wte.weight": (V, E), "transformer.wpe.weight": (7, E)}
    for i in range(layers):
        modules = {"ln_1": (E,), "attn.c_attn": (E, 3 * E), "attn.c_proj": (E, E), "ln_2": (E,),
                   "mlp.c_fc": (E, 4 * E), "mlp.c_proj": (4 * E, E)}  # fmt: skip
        for module, shape in modules.items():
            shapes[f"transformer.h.{i}.{module}.weight"] = shape
            shapes[f"transformer.h.{i}.{module}.bias"] = shape[-1:]
    shapes |= {"transformer.ln_f.weight": (E,), "transformer.ln_f.bias": (E,)}
    return shapes | ({head: (V, E)} if head else {})


def decay_groups(shapes: Shapes) -> list[list[str]]:
    return [[n for n, s in shapes.items() if len(s) > 1], [n for n, s in shapes.items() if len(s) < 2]]


def names_of(weights: Shapes, groups: Sequence[Sequence[str]], shapes: Shapes | None = None) -> list[str | None]:
    """The names found for AdamW's states over these groups, with the weights in a safetensors file beside them."""
    shapes = weights if shapes is None else shapes
    names = in_order(groups)
    numbers = iter(range(len(names)))
    state = {
        "state": {i: {key: torch.ones(shapes[n]) for key in ("exp_avg", "exp_avg_sq")} for i, n in enumerate(names)},
        "param_groups": [
            {
                "params": [next(numbers) for _ in group],
                "weight_decay": 0.0 if g else 0.1,
                "betas": (0.9, 0.99),
                "eps": 1e-8,
            }
            for g, group in enumerate(groups)
        ],
    }
    file = io.BytesIO()
    torch.save(state, file)
    files = {
        "model.safetensors": save({name: torch.ones(shape) for name, shape in weights.items()}),
        "optimizer.pt": file.getvalue(),
    }
    found = locate_listing(list_memory(files, is_directory=True), Path("x"))
    return [m.param for m in found.moments]


def in_order(groups: Sequence[Sequence[str]]) -> list[str]:
    return [name for group in groups for name in group]


@pytest.mark.parametrize("layers", [1, 12])
@pytest.mark.parametrize("head", [None, "lm_head.weight"])
def test_decay_groups(layers: int, head: str | None) -> None:
    shapes = gpt2(layers, head=head)
    groups = decay_groups(shapes)
    assert names_of(shapes, groups) == in_order(groups)
    assert names_of(shapes, groups[::-1]) == groups[1] + groups[0]
    assert names_of(shapes, [list(shapes)]) == list(shapes)


def test_the_base_model_alone_or_inside_another() -> None:
    shapes = gpt2(2)
    for prefix in ("", "net.model.transformer."):
        renamed = {prefix + name.removeprefix("transformer."): shape for name, shape in shapes.items()}
        assert names_of(renamed, decay_groups(renamed)) == in_order(decay_groups(renamed))


def test_of_a_tied_embedding_the_file_has_kept_the_other_name() -> None:
    """The optimizer has it first, as `wte`; the file has it as `lm_head`."""
    shapes = gpt2(2)
    groups = decay_groups(shapes)
    in_file = {name.replace("transformer.wte", "lm_head"): shape for name, shape in shapes.items()}
    expected = [name.replace("transformer.wte", "lm_head") for group in groups for name in group]
    assert names_of(in_file, groups, shapes) == expected


def test_a_later_stage_of_a_pipeline_has_its_head_last() -> None:
    shapes = {name: shape for name, shape in gpt2(2, head="lm_head.weight").items() if ".wte." not in name}
    assert names_of(shapes, decay_groups(shapes)) == in_order(decay_groups(shapes))


@settings(max_examples=40)
@given(st.data())
def test_an_optimizer_in_another_order_gets_right_names_or_none(data: st.DataObject) -> None:
    """Two parameters of different shapes change places, within a group or between groups."""
    shapes = gpt2(data.draw(st.integers(1, 2)))
    groups = decay_groups(shapes)
    if data.draw(st.booleans()):
        groups = [groups[0] + groups[1]]
    flat = [(g, i) for g, group in enumerate(groups) for i in range(len(group))]
    (g, i) = data.draw(st.sampled_from(flat))
    others = [(h, j) for h, j in flat if shapes[groups[h][j]] != shapes[groups[g][i]]]
    (h, j) = data.draw(st.sampled_from(others))
    groups[g][i], groups[h][j] = groups[h][j], groups[g][i]
    found = names_of(shapes, groups)
    truth = in_order(groups)
    assert all(name in (None, true) for name, true in zip(found, truth, strict=True))


@settings(max_examples=30)
@given(st.data())
def test_frozen_parameters_leave_right_names_or_none(data: st.DataObject) -> None:
    shapes = gpt2(2)
    trained = data.draw(st.lists(st.sampled_from(list(shapes)), min_size=1, unique=True))
    groups = [[name for name in group if name in trained] for group in decay_groups(shapes)]
    found = names_of(shapes, [group for group in groups if group])
    truth = in_order(groups)
    assert all(name in (None, true) for name, true in zip(found, truth, strict=True))


def batch_normalised() -> Shapes:
    """A ResNet of transformers: BatchNorm's weights and biases have one shape."""
    block = "resnet.encoder.stages.0.layers.0"
    modules = {"resnet.embedder.embedder": 3, f"{block}.shortcut": 8, f"{block}.layer.0": 8, f"{block}.layer.1": 8}
    shapes: Shapes = {}
    for module, channels in modules.items():
        shapes[f"{module}.convolution.weight"] = (8, channels, 1, 1)
        shapes[f"{module}.normalization.weight"] = (8,)
        shapes[f"{module}.normalization.bias"] = (8,)
    return {**shapes, "classifier.1.weight": (2, 8), "classifier.1.bias": (2,)}


def test_shapes_that_leave_the_division_open_are_divided_as_trainer_does() -> None:
    shapes = batch_normalised()
    groups = [[n for n in shapes if not n.endswith("bias")], [n for n in shapes if n.endswith("bias")]]
    assert names_of(shapes, groups) == groups[0] + groups[1]
    assert set(names_of(shapes, groups[::-1])) <= {None, "resnet.embedder.embedder.convolution.weight",
                                                   "classifier.1.weight", "classifier.1.bias"}  # fmt: skip
    fewer = [groups[0][:-1], [groups[0][-1], *groups[1]]]
    found = names_of(shapes, fewer)
    assert all(name in (None, true) for name, true in zip(found, fewer[0] + fewer[1], strict=True))


@pytest.mark.parametrize(
    "names",
    [[], ["wte.weight"], ["wte.weight", "wpe.weight", "ln_f.weight"], ["wte.weight", "h.0.ln_1.scale"],
     ["wte.weight", "h.0.ln_1.weight", "h.0.extra.weight"],
     ["wte.weight", "h.0.ln_1.weight", "h.00.ln_1.weight"]],
)  # fmt: skip
def test_names_of_no_known_architecture(names: list[str]) -> None:
    assert known_orders(names) == []


def test_layers_in_the_order_of_their_numbers() -> None:
    names = [f"h.{i}.ln_1.{leaf}" for i in sorted(range(12), key=str) for leaf in ("bias", "weight")] + ["wte.weight"]
    (order,) = known_orders(names)
    assert [names[i] for i in order] == [
        "wte.weight", *[f"h.{i}.ln_1.{leaf}" for i in range(12) for leaf in ("weight", "bias")]
    ]  # fmt: skip
