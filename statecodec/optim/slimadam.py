"""SlimAdam: second moments shared along whole dimensions (arXiv 2503.01843, section 5 and table 3)."""

from __future__ import annotations

import fnmatch
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from statecodec.codecs import Shared
from statecodec.errors import OptimizerError
from statecodec.kernels.fused import LARGEST, Hyper
from statecodec.optim import tiles
from statecodec.optim.adamw import TORCH_ADAM, AdamMethod, adam_scalars, check_adam_group, takes_torch_adam
from statecodec.optim.base import StateOptimizer
from statecodec.optim.method import Group, Method, ParameterStep, PerParameter, Recipe, StateSpec
from statecodec.optim.options import Options, check_flags, moment_codec, stored_codec

# Table 3, by the names that model families use: dimension 0 is fan_out (rows), 1 is fan_in. Fused q, k, v projections
# match nothing: their parts want different dimensions.
STATIC_RULES: tuple[tuple[str, tuple[int, ...]], ...] = tuple(
    (pattern, dims)
    for dims, words in (
        ((1,), "q_proj k_proj wq wk query key lm_head head embed_tokens embedding embeddings wte wpe"),
        ((0,), "v_proj o_proj out_proj wv wo value c_proj up_proj gate_proj down_proj c_fc fc1 fc2 w1 w2 w3"),
    )
    for word in words.split()
    for pattern in (f"{word}.weight", f"*.{word}.weight")
)


def read_rules(rules: object) -> list[list[Any]]:
    """Rules in the form that a param group keeps: [[pattern, [dims]], ...]; the first match wins, [] shares nothing.

    Args:
        rules: `static` (STATIC_RULES), None, a mapping from name or pattern to dims (None or []: not shared), a
            sequence of (pattern, dims), or the path of a JSON file {"rules": [{"pattern": ..., "dims": [...]}, ...]}.
            Patterns are shell patterns on parameter names.

    Raises:
        OptimizerError: For rules that cannot be read.
    """
    if rules is None:
        return []
    if isinstance(rules, str) and rules == "static":
        return [[p, list(d)] for p, d in STATIC_RULES]
    if isinstance(rules, str | Path):
        rules = _read_file(Path(rules))
    if isinstance(rules, Mapping):
        rules = list(rules.items())
    if not isinstance(rules, Sequence):
        raise OptimizerError(f"rules={rules!r}: expected 'static', None, a mapping, pairs, or the path of a rules file")
    checked = []
    for rule in rules:
        pair = isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str)
        dims = (rule[1] if rule[1] is not None else ()) if pair else None
        if not isinstance(dims, list | tuple) or not all(type(d) is int and d >= 0 for d in dims):
            raise OptimizerError(f"a rule is a pattern and a list of dimensions from 0, found {str(rule)[:120]}")
        checked.append([rule[0], sorted(set(dims))])
    return checked


def _read_file(path: Path) -> list[tuple[object, object]]:
    try:
        document = json.loads(path.read_text())
        return [(rule["pattern"], rule["dims"]) for rule in document["rules"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = '{"rules": [{"pattern": ..., "dims": [...]}]}'
        raise OptimizerError(f"{path}: not a rules file {expected}: {error}") from error


class SlimMethod(PerParameter):
    """Adam with a second moment whose shared dimensions have size 1.

    The arithmetic is `kernels.reference.steps.shared_adam`.
    """

    name: ClassVar[str] = "slim"

    def __init__(self, dims: tuple[int, ...]) -> None:
        self._dims = self.pools = dims

    def specs(self, param: Tensor, group: Group) -> dict[str, StateSpec]:
        shape = tuple(param.shape)
        first = StateSpec(stored_codec(param, group, "exp_avg"), shape, torch.float32)
        return {"exp_avg": first, "exp_avg_sq": StateSpec(Shared(self._dims), shape, torch.float32)}

    def walk(self, shape: tuple[int, ...], align: int) -> tuple[tiles.Tile, ...]:
        """Slabs of whole indices of dimension 0, so that every tile broadcasts against the shared moment."""
        return tiles.tiles(shape, max(math.prod(shape[1:]), 1))

    def step(self, job: ParameterStep) -> int:
        s, shape = adam_scalars(job), job.recipe.shape
        second = job.states["exp_avg_sq"].parts["mean.data"]
        beta2 = s.pop("beta2")
        total = self.partial(job.grad, job.recipe) if job.pooled is None else job.pooled
        mean = total / math.prod(job.recipe.specs["exp_avg_sq"].shape[d] for d in self._dims)
        moved = (second * beta2).add_(mean, alpha=1 - beta2)
        fits = moved < LARGEST
        # A moment that is too large keeps its old value; NaN in its place makes its weights keep theirs.
        moved.masked_fill_(~fits, math.nan)
        slab = math.prod(shape[1:])
        kept = 0
        for at, tile in enumerate(job.recipe.walk):
            full = ((tile.stop - tile.start) // max(slab, 1), *shape[1:])
            part = job.part(at, tile)
            g = job.gradient(tile, part.weight)
            v = moved if 0 in self._dims else moved[tile.start // max(slab, 1) :][: full[0]]
            job.arithmetic.shared_adam(part.weight.view(full), g.view(full), part.values[0].view(full), v, **s)
            kept += part.store()
        second.copy_(torch.where(fits, moved, second))
        return kept

    def partial(self, grad: Tensor, recipe: Recipe) -> Tensor:
        """The sum of g * g over the shared dimensions, in their keepdim shape."""
        shape, slab = recipe.shape, math.prod(recipe.shape[1:])
        sizes = tuple(1 if d in self._dims else n for d, n in enumerate(shape))
        total = torch.zeros(sizes, dtype=torch.float32, device=grad.device)
        for tile in recipe.walk:
            full = ((tile.stop - tile.start) // max(slab, 1), *shape[1:])
            g = grad.reshape(-1)[tile.start : tile.stop].view(full).to(torch.float32)
            part = g.square().sum(self._dims, keepdim=True)
            where = total if 0 in self._dims else total[tile.start // max(slab, 1) :][: full[0]]
            where.add_(part)
        return total

    def hyper(self, group: Group) -> Hyper | None:
        return AdamMethod().hyper(group)


class SlimAdam(StateOptimizer):
    """AdamW whose second moments are shared along a matrix's inputs or outputs, as rules say.

    Args:
        params: `model.named_parameters()`, because rules go by name; or groups with names. A rule that matches no
            parameter is a warning.
        lr: Learning rate, a float or a 0-d tensor.
        betas: Decay rates of the averages of the gradient and of its square, per step.
        eps: What is added to the root of the second moment.
        weight_decay: Weight decay per unit of lr.
        rules: Which dimensions to share, by name: `static` (the paper's table 3), None, a mapping or pairs, or a rules
            file such as `statecodec analyze -o` writes. The first match wins; vectors are never shared.
        decay_vectors: False, as in the published code, applies no weight decay to parameters of fewer than two
            dimensions.
        **options: Options that every optimizer takes; see StateOptimizer. `moments` says how first moments, and second
            moments that are not shared, are stored; by default `dense`, as in the published code.

    Raises:
        OptimizerError: For an option or a parameter that cannot be taken.

    Source:
        SlimAdam (arXiv 2503.01843), section 5 and table 3.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(128, 64)
        >>> optimizer = SlimAdam(model.named_parameters(), lr=1e-3, rules={"weight": [1]})
        >>> model(torch.ones(2, 128)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg_sq"].parts["mean.data"].shape
        torch.Size([64, 1])
    """

    algorithm: ClassVar[str] = "slimadam"
    sees_shapes: ClassVar[bool] = True
    torch_options: ClassVar[dict[str, Any]] = TORCH_ADAM

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        rules: object = "static",
        decay_vectors: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rules": rules,
            "decay_vectors": decay_vectors,
        }  # fmt: skip
        super().__init__(params, defaults, {"moments": "dense", **options})
        self._warn_of_idle_rules()

    def settle_group(self, group: Group) -> None:
        group["rules"] = read_rules(group["rules"])
        super().settle_group(group)
        check_adam_group(group)
        check_flags(group, "decay_vectors")
        for state in ("exp_avg", "exp_avg_sq"):
            moment_codec(group["moments"], state)

    def _warn_of_idle_rules(self) -> None:
        """Warn of rules that match no parameter: nothing would be shared, without a word."""
        names = {name: None for p in self.parameters() if (name := self.name(p)) is not None}
        idle: dict[str, None] = {}
        for rules in (group["rules"] for group in self.param_groups):
            unmatched = [pattern for pattern, _ in rules if pattern not in names and not fnmatch.filter(names, pattern)]
            if rules != read_rules("static"):
                idle.update(dict.fromkeys(unmatched))
            elif len(unmatched) == len(rules):  # static rules are for many model families: one match is enough
                idle["all of the static ones"] = None
        if idle:
            seen = f"names are like {', '.join([*names][:4])}" if names else "the parameters have no names"
            warnings.warn(f"SlimAdam rules that match no parameter: {', '.join([*idle][:4])}; {seen}", stacklevel=3)

    def takes_torch_group(self, group: Mapping[str, Any]) -> bool:
        return takes_torch_adam(group, l2=False)

    def method(self, param: Tensor, name: str | None, group: Group) -> Method:
        plain = AdamMethod(decays=param.ndim >= 2 or bool(group["decay_vectors"]))
        dims = next((tuple(d) for pattern, d in group["rules"] if name and fnmatch.fnmatchcase(name, pattern)), ())
        if param.ndim < 2 or not dims or not param.numel():
            return plain
        if dims[-1] >= param.ndim:
            raise OptimizerError(f"rule for {name}: dimensions {list(dims)} of a shape {tuple(param.shape)}")
        if param.dtype == torch.float64:
            raise OptimizerError("SlimAdam keeps fp32 states; step fp64 parameters with AdamW(moments='dense')")
        return SlimMethod(dims)
