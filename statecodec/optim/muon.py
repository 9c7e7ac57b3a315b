"""Muon: the momentum of hidden matrices, made orthogonal by Newton-Schulz; everything else gets AdamW.

Source: Jordan et al. 2024, and torch.optim.Muon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from statecodec.optim.adamw import AdamMethod, check_adam_group
from statecodec.optim.base import StateOptimizer
from statecodec.optim.hidden_matrix import is_hidden_matrix
from statecodec.optim.matrices import Batch, WholeMatrix
from statecodec.optim.method import Group, Method, StateSpec
from statecodec.optim.options import (
    Options,
    check_choice,
    check_flags,
    check_integer,
    check_number,
    moment_codec,
    stored_codec,
)

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADJUSTMENTS = ("match_rms_adamw", "original")


def newton_schulz(matrix: Tensor, iterations: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """A matrix with the singular vectors of `matrix`, and singular values between 0.7 and 1.2.

    Args:
        matrix: (..., rows, cols), of any float dtype, which the result has too.
        iterations: How many; torch.optim.Muon calls them `ns_steps`.
        dtype: What is computed in; None is bf16 on a GPU, and fp32 elsewhere (fp64 for fp64 input), because CPUs have
            no fast bf16 matrix product.
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrix.is_cuda else torch.float64 if matrix.dtype == torch.float64 else torch.float32
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).to(dtype)
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=1e-37)  # tiny gradients: their squares would underflow
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x.reshape(-1, *x.shape[-2:])
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = x.mT if tall else x
    return result.to(matrix.dtype).view(matrix.shape)


def step_size(group: Group, rows: int, cols: int) -> float:
    """The factor of lr for a matrix of rows x cols, as in torch.optim.Muon's `adjust_lr_fn`."""
    if group["adjust"] == "original":
        return float(max(1.0, rows / cols) ** 0.5)
    return float(0.2 * max(rows, cols) ** 0.5)


class MuonMethod(WholeMatrix):
    """The buffer is lerp(buffer, g, 1 - momentum); the step is Newton-Schulz of it.

    With Nesterov's momentum it is Newton-Schulz of lerp(g, buffer, momentum).
    """

    name: ClassVar[str] = "muon"

    def specs(self, param: Tensor, group: Group) -> dict[str, StateSpec]:
        codec = stored_codec(param, group, "momentum_buffer")
        return {"momentum_buffer": StateSpec(codec, tuple(param.shape), self.state_dtype(param))}

    def update(self, batch: Batch) -> None:
        group, state, g = batch.group, batch.states["momentum_buffer"], batch.gradient
        momentum = float(group["momentum"])
        buffer = state.decode(batch.backend).lerp_(g, 1 - momentum)
        state.encode(buffer, batch.backend)
        update = newton_schulz(g.lerp_(buffer, momentum) if group["nesterov"] else buffer, int(group["ns_steps"]))
        size = step_size(group, *g.shape[1:])
        batch.weight.mul_(batch.decay).sub_(update.mul_(batch.lr * size))


def check_muon_group(group: Group) -> None:
    """Raise OptimizerError for an option of Newton-Schulz or the momentum that is out of range."""
    check_number("momentum", group["momentum"], 0, 1, open_top=True)
    check_integer("ns_steps", group["ns_steps"], 1, 99)
    check_choice("adjust", group["adjust"], ADJUSTMENTS)


class Muon(StateOptimizer):
    """Orthogonalised momentum for hidden matrices, AdamW for embeddings, heads and vectors, in one optimizer.

    Args:
        params: `model.named_parameters()`, so that embeddings and heads are known by name and get AdamW; or parameters
            or groups, with `matrix` set per group.
        lr: Learning rate, a float or a 0-d tensor.
        momentum: As in torch.optim.Muon.
        nesterov: As in torch.optim.Muon.
        weight_decay: Weight decay per unit of lr.
        ns_steps: Number of Newton-Schulz iterations, as in torch.optim.Muon.
        adjust: `match_rms_adamw` scales updates by 0.2 sqrt(max(rows, cols)), so that lr and weight_decay of AdamW fit
            both kinds; `original` by sqrt(max(1, rows / cols)).
        betas: AdamW's.
        eps: AdamW's.
        adam_lr_ratio: AdamW's learning rate is lr times this.
        **options: Options that every optimizer takes; see StateOptimizer. `moments` says how the momentum buffer, and
            AdamW's moments, are stored.

    Raises:
        OptimizerError: For an option or a parameter that cannot be taken.

    Source:
        Jordan et al. 2024 (kellerjordan.github.io/posts/muon), and torch.optim.Muon.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(128, 64)
        >>> optimizer = Muon(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 128)).square().mean().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[model.weight]), list(optimizer.state[model.bias])
        (['step', 'skipped', 'momentum_buffer'], ['step', 'skipped', 'exp_avg', 'exp_avg_sq'])
    """

    algorithm: ClassVar[str] = "muon"
    torch_options: ClassVar[dict[str, Any]] = {
        "momentum": 0.95, "nesterov": True, "ns_steps": 5, "ns_coefficients": COEFFICIENTS, "eps": 1e-7,
        "adjust_lr_fn": None,
    }  # fmt: skip
    sees_shapes: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        *,
        ns_steps: int = 5,
        adjust: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adam_lr_ratio: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "ns_steps": ns_steps,
            "adjust": adjust, "betas": betas, "eps": eps, "adam_lr_ratio": adam_lr_ratio,
        }  # fmt: skip
        super().__init__(params, defaults, options)

    def settle_group(self, group: Group) -> None:
        super().settle_group(group)
        check_adam_group(group)
        check_muon_group(group)
        check_flags(group, "nesterov")
        check_number("adam_lr_ratio", group["adam_lr_ratio"], 0)
        for state in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            moment_codec(group["moments"], state)

    def method(self, param: Tensor, name: str | None, group: Group) -> Method:
        matrix = is_hidden_matrix(param, name, group)
        return MuonMethod() if matrix else AdamMethod(lr_ratio=float(group["adam_lr_ratio"]))

    def from_torch_group(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        ours = {k: v for k, v in group.items() if k != "eps"}  # there Muon's, here AdamW's
        return {**ours, "adjust": group["adjust_lr_fn"] or "original"} if "adjust_lr_fn" in group else ours

    def to_torch_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        shared = {k: group[k] for k in ("momentum", "nesterov", "ns_steps")}
        return {**self.torch_options, **shared, "adjust_lr_fn": group["adjust"]}

    def takes_torch_group(self, group: Mapping[str, Any]) -> bool:
        return "ns_steps" in group and "nesterov" in group
