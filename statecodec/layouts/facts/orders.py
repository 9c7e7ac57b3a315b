"""The order of parameters in well-known models, for files whose tensors are sorted by name.

Optimizers number parameters in the order in which a model's modules were made; safetensors files have lost it. Here it
is written down as transformers, timm and torchvision make these models. Where versions differ, each order is given, and
shapes have to tell which one it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

Key: TypeAlias = "tuple[tuple[int, int], ...]"
"""For every word of a dotted name its rank among its siblings, and its number."""

_LEAVES: Final = {"weight": 0, "bias": 1}
_FIRST: Final = (0, -1)
_BEHIND: Final = (1_000_000, -1)


class _Modules:
    """A tree of modules in order, made of dotted paths; `#` stands for a number."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.children: dict[str, _Modules] = {}
        below: dict[str, list[str]] = {}
        for path in paths:
            word, _, rest = path.partition(".")
            below.setdefault(word, []).extend([rest] if rest else [])
        self.ranks = {word: rank for rank, word in enumerate(below)}
        self.children = {word: _Modules(rests) for word, rests in below.items()}

    def key(self, words: Sequence[str]) -> Key | None:
        """What sorts parameters in the model's order; None for a parameter that is not in the tree."""
        here = self
        key: list[tuple[int, int]] = []
        for at, word in enumerate(words):
            if not here.children:
                return (*key, (_LEAVES[word], -1)) if word in _LEAVES and at == len(words) - 1 else None
            number = -1
            if word not in here.children:
                digits = re.search(r"\d{1,9}", word)
                number = int(digits[0]) if digits else -1
                word = re.sub(r"\d+", "#", word)
            if word not in here.children:
                return None
            key.append((here.ranks[word], number))
            here = here.children[word]
        return None if here.children else tuple(key)


class Architecture:
    """A base model, whose parameters may all begin with the same words, and the heads that may be added to it."""

    def __init__(self, body: str, heads: str = "") -> None:
        """Modules in order, separated by spaces; `x.(a b)` is short for `x.a x.b`."""
        self._body, self._heads = _Modules(_spelt_out(body)), _Modules(_spelt_out(heads))

    def orders(self, names: Sequence[str]) -> Iterator[list[int]]:
        """Positions in `names`, in the orders that the model may have; none if a name is not of this architecture."""
        paths = _without_common_words([name.split(".") for name in names])
        heads = [self._heads.key(path) for path in paths]
        base = iter(_without_common_words([p for p, head in zip(paths, heads, strict=True) if head is None]))
        keys: list[Key] = []
        for head in heads:
            key = self._body.key(next(base)) if head is None else (_BEHIND, *head)
            if key is None:
                return
            keys.append(key)
        in_blocks = any(number >= 0 for key in keys if key[0] != _BEHIND for _, number in key)
        if not in_blocks or len(set(keys)) != len(keys):
            return
        yield sorted(range(len(keys)), key=keys.__getitem__)
        if not any(key[0] == _FIRST for key in keys):
            # Of an embedding that is tied to the head the file may have kept the head's name; it was made first.
            tied = [(_FIRST, *key[1:]) if key[:2] == (_BEHIND, _FIRST) else key for key in keys]
            yield sorted(range(len(keys)), key=tied.__getitem__)


def known_orders(names: Sequence[str]) -> list[list[int]]:
    """The orders that the parameters of these names may have in their model, as positions in `names`.

    Empty for a model that is not known.
    """
    orders: list[list[int]] = []
    for architecture in ARCHITECTURES.values():
        orders += [order for order in architecture.orders(names) if order not in orders]
    return orders


def _without_common_words(paths: list[list[str]]) -> list[list[str]]:
    common = 0
    if paths:
        first, last = min(paths), max(paths)
        while common < min(len(first), len(last)) - 1 and first[common] == last[common]:
            common += 1
    return [path[common:] for path in paths]


def _spelt_out(text: str) -> list[str]:
    paths: list[str] = []
    for outer, inner, plain in re.findall(r"(\S+)\.\(([^)]*)\)|(\S+)", text):
        paths += [f"{outer}.{child}" for child in inner.split()] if outer else [plain]
    return paths


def _llama(mlp: str) -> Architecture:
    return Architecture(
        "embed_tokens"
        " layers.#.self_attn.(q_proj k_proj v_proj o_proj qkv_proj q_norm k_norm)"
        f" layers.#.mlp.({mlp})"
        " layers.#.(input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm)"
        " norm",
        "lm_head score",
    )


def _vit(block: str) -> Architecture:
    return Architecture(
        "embeddings.(cls_token mask_token position_embeddings patch_embeddings.projection)"
        f" {block} layernorm pooler.dense",
        "classifier",
    )


def _bert(embeddings: str, heads: str) -> Architecture:
    return Architecture(
        f"embeddings.({embeddings})"
        " encoder.layer.#.attention.(self.query self.key self.value output.dense output.LayerNorm)"
        " encoder.layer.#.(intermediate.dense output.dense output.LayerNorm)"
        " pooler.dense",
        heads,
    )


_ROBERTA_HEADS: Final = "lm_head.(bias dense layer_norm) classifier.(dense out_proj)"

ARCHITECTURES: Final = {
    "gpt2": Architecture(
        "wte wpe h.#.(ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj) ln_f", "lm_head score",
    ),
    # Llama, Mistral, Qwen 2 and 3, Gemma, Phi-3, OLMo 2, Granite, SmolLM3, StarCoder 2
    "llama": _llama("gate_up_proj gate_proj up_proj down_proj c_fc c_proj"),
    "llama, transformers before 4.31": _llama("gate_proj down_proj up_proj"),
    "gpt_neox": Architecture(
        "embed_in"
        " layers.#.(input_layernorm post_attention_layernorm attention.query_key_value attention.dense)"
        " layers.#.mlp.(dense_h_to_4h dense_4h_to_h)"
        " final_layer_norm",
        "embed_out lm_head score",
    ),
    "vit": _vit("layers.#.(attention.q_proj attention.k_proj attention.v_proj attention.o_proj)"
                " layers.#.(layernorm_before layernorm_after mlp.fc1 mlp.fc2)"),
    # transformers 5 writes the module names of transformers 4, and keeps its own order.
    "vit, transformers 5": _vit(
        "encoder.layer.#.attention.(attention.query attention.key attention.value output.dense)"
        " encoder.layer.#.(layernorm_before layernorm_after intermediate.dense output.dense)"
    ),
    "vit, transformers 4": _vit(
        "encoder.layer.#.attention.(attention.query attention.key attention.value output.dense)"
        " encoder.layer.#.(intermediate.dense output.dense layernorm_before layernorm_after)"
    ),
    "vit, timm": Architecture(
        "cls_token reg_token pos_embed patch_embed.proj"
        " blocks.#.(norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2)"
        " norm fc_norm",
        "head",
    ),
    "resnet": Architecture(
        "embedder.embedder.(convolution normalization)"
        " encoder.stages.#.layers.#.shortcut.(convolution normalization)"
        " encoder.stages.#.layers.#.layer.#.(convolution normalization)",
        "classifier.#",
    ),
    "resnet, torchvision": Architecture(
        "conv1 bn1 layer#.#.(conv1 bn1 conv2 bn2 conv3 bn3 downsample.0 downsample.1)", "fc",
    ),
    "bert": _bert(
        "word_embeddings position_embeddings token_type_embeddings LayerNorm",
        "cls.predictions.(bias transform.dense transform.LayerNorm) classifier qa_outputs",
    ),
    "roberta": _bert("word_embeddings token_type_embeddings LayerNorm position_embeddings", _ROBERTA_HEADS),
    "roberta, transformers 4": _bert(
        "word_embeddings position_embeddings token_type_embeddings LayerNorm", _ROBERTA_HEADS,
    ),
}  # fmt: skip
