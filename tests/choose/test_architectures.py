"""Names of real model families, as their checkpoints write them."""

from __future__ import annotations

import pytest

from statecodec.choose.architectures import layer_type, parts, recognise, uses_conv1d

LLAMA = {
    "model.embed_tokens.weight": ((32000, 64), "token_embedding", (1,)),
    "model.layers.0.self_attn.q_proj.weight": ((64, 64), "query", (1,)),
    "model.layers.0.self_attn.k_proj.weight": ((16, 64), "key", (1,)),
    "model.layers.0.self_attn.v_proj.weight": ((16, 64), "value", (0,)),
    "model.layers.0.self_attn.o_proj.weight": ((64, 64), "attention_output", (0,)),
    "model.layers.0.mlp.gate_proj.weight": ((128, 64), "mlp_gate", (0,)),
    "model.layers.0.mlp.up_proj.weight": ((128, 64), "mlp_up", (0,)),
    "model.layers.0.mlp.down_proj.weight": ((64, 128), "mlp_down", (0,)),
    "model.layers.0.input_layernorm.weight": ((64,), "vector", ()),
    "model.norm.weight": ((64,), "vector", ()),
    "lm_head.weight": ((32000, 64), "lm_head", (1,)),
}
NANOGPT = {
    "transformer.wte.weight": ((50304, 64), "token_embedding", (1,)),
    "transformer.wpe.weight": ((1024, 64), "position_embedding", (1,)),
    "transformer.h.0.attn.c_attn.weight": ((192, 64), "fused_qkv", None),
    "transformer.h.0.attn.c_attn.bias": ((192,), "vector", ()),
    "transformer.h.0.attn.c_proj.weight": ((64, 64), "attention_output", (0,)),
    "transformer.h.0.mlp.c_fc.weight": ((256, 64), "mlp_up", (0,)),
    "transformer.h.0.mlp.c_proj.weight": ((64, 256), "mlp_down", (0,)),
    "transformer.h.0.ln_1.weight": ((64,), "vector", ()),
}
GPT2 = {  # transformers stores its linear layers (fan_in, fan_out)
    "transformer.h.0.attn.c_attn.weight": ((64, 192), "fused_qkv", None),
    "transformer.h.0.attn.c_proj.weight": ((64, 64), "attention_output", (1,)),
    "transformer.h.0.mlp.c_fc.weight": ((64, 256), "mlp_up", (1,)),
    "transformer.h.0.mlp.c_proj.weight": ((256, 64), "mlp_down", (1,)),
    "transformer.wte.weight": ((50257, 64), "token_embedding", (1,)),
}
PYTHIA = {
    "gpt_neox.embed_in.weight": ((50304, 64), "token_embedding", (1,)),
    "gpt_neox.layers.0.attention.query_key_value.weight": ((192, 64), "fused_qkv", None),
    "gpt_neox.layers.0.attention.dense.weight": ((64, 64), "attention_output", (0,)),
    "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": ((256, 64), "mlp_up", (0,)),
    "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": ((64, 256), "mlp_down", (0,)),
    "embed_out.weight": ((50304, 64), "lm_head", (1,)),
}
VIT = {
    "patch_embed.proj.weight": ((64, 3, 16, 16), "vision_first", (1, 2, 3)),
    "pos_embed": ((1, 197, 64), "position_embedding", (2,)),
    "blocks.0.attn.qkv.weight": ((192, 64), "fused_qkv", None),
    "blocks.0.attn.proj.weight": ((64, 64), "attention_output", (0,)),
    "blocks.0.mlp.fc1.weight": ((256, 64), "mlp_up", (0,)),
    "blocks.0.mlp.fc2.weight": ((64, 256), "mlp_down", (0,)),
    "blocks.0.norm1.weight": ((64,), "vector", ()),
    "head.weight": ((1000, 64), "vision_head", (1,)),
}
RESNET = {
    "conv1.weight": ((64, 3, 7, 7), "conv", None),
    "layer1.0.conv2.weight": ((64, 64, 3, 3), "conv", None),
    "layer1.0.bn1.weight": ((64,), "vector", ()),
    "fc.weight": ((1000, 512), "vision_head", (1,)),
}


FAMILIES = {"llama": LLAMA, "nanogpt": NANOGPT, "gpt2": GPT2, "neox": PYTHIA, "vit": VIT, "resnet": RESNET}


@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_families(model: dict[str, tuple[tuple[int, ...], str, tuple[int, ...] | None]], prefix: str) -> None:
    layers = recognise({prefix + name: shape for name, (shape, _, _) in model.items()})
    for name, (_, kind, dims) in model.items():
        layer = layers[prefix + name]
        assert (layer.kind, layer.recommended) == (kind, dims), name


@pytest.mark.parametrize("name", ["q_proj.bias", "v_proj.bias", "ln_1.weight", "attn.c_attn.bias"])
def test_vectors_are_never_shared(name: str) -> None:
    layer = recognise({name: (64,)})[name]
    assert not layer.shareable
    assert layer.recommended == ()
    # ... nor matrices called bias, nor a vector with dimensions of size 1 around it.
    assert not recognise({name.replace("weight", "bias"): (8, 8)})[name.replace("weight", "bias")].shareable
    assert not recognise({"scale": (1, 64, 1)})["scale"].shareable


def test_norm_matrices_are_left_alone() -> None:
    assert not recognise({"block.norm.weight": (8, 8)})["block.norm.weight"].shareable


def test_words_are_whole() -> None:
    """The published matcher takes `qkv.weight` for a value projection and `embedding_norm` for an embedding."""
    layers = recognise({"attn.qkv.weight": (192, 64), "embedding_norm.weight": (8, 8), "my_head_mix.weight": (4, 4)})
    assert layers["attn.qkv.weight"].kind == "fused_qkv"
    assert layers["embedding_norm.weight"].kind == "norm"
    assert layers["my_head_mix.weight"].kind == "unknown"


def test_parts_of_fused_projections() -> None:
    def of(name: str, shape: tuple[int, ...]) -> list[tuple[str, int, int, int]]:
        layer = recognise({name: shape})[name]
        return [(p.kind, p.dim, p.start, p.stop) for p in parts(layer, shape)]

    assert of("h.0.attn.c_attn.weight", (192, 64)) == [("query", 0, 0, 64), ("key", 0, 64, 128), ("value", 0, 128, 192)]
    assert of("layers.0.qkv_proj.weight", (96, 64)) == [("query", 0, 0, 64), ("key", 0, 64, 80), ("value", 0, 80, 96)]
    assert of("h.0.attn.c_attn.weight", (64, 192)) == [("query", 1, 0, 64), ("key", 1, 64, 128), ("value", 1, 128, 192)]
    assert of("layers.0.attention.query_key_value.weight", (192, 64)) == []  # interleaved by head
    assert of("h.0.attn.c_attn.weight", (64, 64)) == []
    assert of("q_proj.weight", (192, 64)) == []


def test_conv1d_is_told_by_its_shape() -> None:
    assert uses_conv1d({"h.0.attn.c_attn.weight": (64, 192)})
    assert not uses_conv1d({"h.0.attn.c_attn.weight": (192, 64)})
    assert not uses_conv1d({"h.0.attn.c_proj.weight": (64, 192)})


def test_a_head_over_embedded_tokens_is_no_vision_head() -> None:
    shapes = {"wte.weight": (300, 64), "blocks.0.fc1.weight": (256, 64), "head.weight": (300, 64)}
    found = recognise(shapes)["head.weight"]
    assert (found.kind, found.recommended, found.mixed) == ("lm_head", (1,), False)
    assert recognise({**shapes, "head.weight": (10, 64)})["head.weight"].kind == "vision_head"


def test_layer_type() -> None:
    assert layer_type("transformer.h.11.attn.c_proj.weight") == "transformer.h.*.attn.c_proj.weight"
    assert layer_type("fc1.weight") == "fc1.weight"
