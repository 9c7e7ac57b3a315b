"""The kind of a parameter, from its name and shape, and what SlimAdam recommends for it.

The recommended dimensions are those of arXiv 2503.01843, table 3. A weight of torch.nn.Linear is (fan_out, fan_in):
dimension 0 is fan_out, 1 is fan_in. Transformers' GPT-2 stores them the other way round (Conv1D), which the shape of
its fused projection shows. Names decide by whole words, so that `c_attn` is no `attn` and `v_proj.bias` is no matrix.
What matches nothing is `unknown` and gets no recommendation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from statecodec.choose.snr import Dims
from statecodec.names import bare_name

# kind -> the sides to share over; the paper finds those in MIXED inconsistent across tasks.
RECOMMENDED: dict[str, str] = {
    "query": "fan_in", "key": "fan_in", "value": "fan_out", "attention_output": "fan_out", "mlp_up": "fan_out",
    "mlp_gate": "fan_out", "mlp_down": "fan_out", "token_embedding": "embedding", "position_embedding": "embedding",
    "lm_head": "fan_in", "vision_first": "fan_in", "vision_head": "fan_in",
}  # fmt: skip
MIXED = frozenset(("mlp_up", "mlp_gate", "vision_head"))
FUSED = "fused_qkv"

# Patterns over the dotted module path without its trailing `.weight`; the first that is found decides.
_WORD = r"(?:^|\.)(?:{})$"
_KINDS: tuple[tuple[str, str], ...] = (
    ("norm", r"(?:^|[._])(?:\w*layer_?norm\w*|\w*rms_?norm\w*|ln_?\w*|norm\w*|\w+_norm|bn\d*|\w*batch_?norm\w*)$"),
    ("token_embedding", _WORD.format(r"wte|embed_tokens|tok_emb(?:eddings?)?|token_embedding\w*|embed_in"
                                     r"|word_embeddings|shared")),
    ("position_embedding", _WORD.format(r"wpe|embed_positions|pos_emb\w*|position_embeddings?|pos_embed")),
    ("vision_first", _WORD.format(r"patch_embed\.proj|patch_embeddings\.projection|conv_proj")),
    (FUSED, _WORD.format(r"c_attn|qkv|qkv_proj|Wqkv|wqkv|query_key_value|in_proj_weight|attn\.in_proj|in_proj")),
    ("query", _WORD.format(r"q_proj|wq|query|q|q_lin|to_q")),
    ("key", _WORD.format(r"k_proj|wk|key|k|k_lin|to_k")),
    ("value", _WORD.format(r"v_proj|wv|value|v|v_lin|to_v")),
    ("attention_output", r"(?:^|\.)(?:(?:attn|attention|self_attn|self_attention)"
                         r"\.(?:c_proj|out_proj|o_proj|proj|dense|output_proj|wo)"
                         r"|o_proj|wo|attention\.output\.dense|self_attention\.out_proj|out_lin|to_out\.0)$"),
    ("mlp_gate", _WORD.format(r"gate_proj|w1")),
    ("mlp_up", _WORD.format(r"up_proj|w3|c_fc|fc1|mlp_up|dense_h_to_4h|intermediate\.dense|lin1|mlp\.0|linear1")),
    ("mlp_down", _WORD.format(r"down_proj|w2|mlp\.c_proj|fc2|mlp_proj|dense_4h_to_h|output\.dense|lin2|mlp\.3|linear2"
                              r"|c_proj")),
    ("lm_head", _WORD.format(r"lm_head|embed_out|output")),
    ("vision_head", _WORD.format(r"head|heads\.head|classifier|fc")),
)  # fmt: skip
_COMPILED = tuple((kind, re.compile(pattern)) for kind, pattern in _KINDS)
# Families whose fused projection interleaves q, k and v head by head: without the number of heads it cannot be taken
# apart.
_INTERLEAVED = re.compile(r"(?:^|\.)query_key_value$")


@dataclass(frozen=True)
class Layer:
    """A recognised parameter.

    `recommended` are the dimensions to share: None if the paper has no advice for it, () for "keep".
    """

    name: str
    kind: str
    recommended: Dims | None
    mixed: bool = False
    transposed: bool = False

    @property
    def shareable(self) -> bool:
        """Whether an SNR rule may share it at all: not vectors, not norms."""
        return self.kind not in ("vector", "norm")


@dataclass(frozen=True)
class FusedPart:
    """One of q, k, v inside a fused projection: a range of its fan_out dimension."""

    name: str
    kind: str
    dim: int
    start: int
    stop: int


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layer]:
    """What every parameter of a model is, by name; `shapes` are those of its parameters."""
    transposed = uses_conv1d(shapes)
    layers = {name: _layer(name, shape, transposed=transposed) for name, shape in shapes.items()}
    vocabularies = {shapes[name][0] for name, layer in layers.items() if layer.kind == "token_embedding"}
    for name, layer in layers.items():  # a `head` over tokens is no classifier of images
        if layer.kind == "vision_head" and shapes[name][0] in vocabularies:
            layers[name] = replace(layer, kind="lm_head", mixed=False)
    return layers


def uses_conv1d(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether linear layers are stored (fan_in, fan_out), as transformers' GPT-2 does: its c_attn is d x 3d."""
    fused = [s for n, s in shapes.items() if _module(n).endswith("c_attn") and len(s) == 2]
    return bool(fused) and all(s[1] == 3 * s[0] for s in fused)


def parts(layer: Layer, shape: tuple[int, ...]) -> tuple[FusedPart, ...]:
    """The rows of q, k and v in a fused projection; () if it is not one or cannot be taken apart.

    With grouped queries q is square and k and v share the rest. `query_key_value` (NeoX, BLOOM) interleaves its heads,
    so it gives ().
    """
    if layer.kind != FUSED or len(shape) != 2 or _INTERLEAVED.search(_module(layer.name)):
        return ()
    dim = 1 if layer.transposed else 0
    out, width = shape[dim], shape[1 - dim]
    rest = out - width
    if rest <= 0 or rest % 2 or rest // 2 > width:
        return ()
    bounds = (0, width, width + rest // 2, out)
    return tuple(
        FusedPart(f"{layer.name}[{k[0]}]", k, dim, bounds[i], bounds[i + 1])
        for i, k in enumerate(("query", "key", "value"))
    )


def layer_type(name: str) -> str:
    """The name with every layer number replaced by `*`: `h.3.attn.c_proj.weight` -> `h.*.attn.c_proj.weight`."""
    return ".".join("*" if word.isdecimal() else word for word in name.split("."))


def _module(name: str) -> str:
    return re.sub(r"\.weight$", "", bare_name(name))


def _layer(name: str, shape: tuple[int, ...], *, transposed: bool) -> Layer:
    # A (1, n, d) position table is a matrix with a batch dimension; any other single long dimension is a vector.
    long = sum(n > 1 for n in shape)
    if len(shape) < 2 or long < 2 or name.endswith("bias"):
        return Layer(name, "vector", ())
    kind = next(
        (k for k, pattern in _COMPILED if pattern.search(_module(name))), "conv" if len(shape) > 2 else "unknown"
    )
    if kind == "norm":
        return Layer(name, kind, ())
    flipped = transposed and bool(re.search(r"(?:^|\.)c_(?:attn|proj|fc)$", _module(name)))
    side = RECOMMENDED.get(kind)
    dims = None if side is None else _dims(side, len(shape), flipped=flipped)
    return Layer(name, kind, dims, kind in MIXED, flipped)


def _dims(side: str, ndim: int, *, flipped: bool) -> Dims:
    """Dimensions of a side. fan_in of a convolution (out, in, kh, kw) is everything but dimension 0."""
    if side == "embedding":
        return (ndim - 1,)
    fan_out: Dims = (0,)
    fan_in: Dims = tuple(range(1, ndim))
    if flipped:
        fan_out, fan_in = fan_in, fan_out
    return fan_in if side == "fan_in" else fan_out
