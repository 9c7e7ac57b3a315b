"""FOAM: Adam on block means, plus the residual of the current gradient.

Source: arXiv 2512.07112, algorithm 1, and its published code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from statecodec.codecs import Folded, Raw
from statecodec.errors import OptimizerError
from statecodec.kernels.fused import Hyper
from statecodec.optim import sharding
from statecodec.optim.adamw import TORCH_ADAM, AdamMethod, adam_scalars, check_adam_group
from statecodec.optim.base import StateOptimizer
from statecodec.optim.hidden_matrix import is_hidden_matrix
from statecodec.optim.method import Elementwise, Group, Method, ParameterStep, StateSpec, decay_per_lr, matrix_shape
from statecodec.optim.options import Options, check_choice, check_integer, check_number, moment_codec

# (mean of squares, true tail mean, eps next to the corrected root, decay before the step)
VARIANTS = {
    "safe": (True, True, True, True),
    "official": (True, False, False, False),
    "paper": (False, False, False, False),
}


class FoamMethod(Elementwise):
    """Folded moments; the arithmetic is `kernels.reference.steps.foam`.

    A convolution kernel is seen as a matrix of one row per output.
    """

    name: ClassVar[str] = "foam"

    def __init__(self, level: int) -> None:
        self._level = level

    def view_shape(self, param: Tensor) -> tuple[int, ...]:
        return matrix_shape(tuple(param.shape))

    def specs(self, param: Tensor, group: Group) -> dict[str, StateSpec]:
        shape = self.view_shape(param)
        if not sharding.fits_between_cuts(Folded(self._level), param, shape):
            raise OptimizerError(
                f"a parameter of shape {tuple(param.shape)} is cut inside blocks of {1 << self._level} columns; shard "
                "dimension 0, or a multiple of the block, or use a smaller level"
            )
        return {
            k: StateSpec(self._codec(param, group, k, shape), shape, torch.float32) for k in ("exp_avg", "exp_avg_sq")
        }

    def _codec(self, param: Tensor, group: Group, state: str, shape: tuple[int, ...]) -> Folded:
        folded = Folded(self._level, moment_codec(group["moments"], state))
        exact = param.numel() < group["dense_below"] or not sharding.fits_between_cuts(folded, param, shape)
        return Folded(self._level, Raw()) if exact else folded

    def scalars(self, job: ParameterStep) -> dict[str, Any]:
        mean_of_squares, true_tail, torch_bias, decay_first = VARIANTS[job.group["variant"]]
        return {
            **adam_scalars(job), "block": 1 << self._level, "scale": float(job.group["scale"]),
            "residual": float(job.group["residual_scale"]), "mean_of_squares": mean_of_squares, "true_tail": true_tail,
            "torch_bias": torch_bias, "decay_first": decay_first,
        }  # fmt: skip

    def hyper(self, group: Group) -> Hyper | None:
        mean_of_squares, true_tail, torch_bias, decay_first = VARIANTS[group["variant"]]
        beta1, beta2 = (float(b) for b in group["betas"])
        return Hyper(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            decay=decay_per_lr(group),
            maximize=group["maximize"],
            scale=float(group["scale"]),
            residual=float(group["residual_scale"]),
            mean_of_squares=mean_of_squares,
            true_tail=true_tail,
            torch_bias=torch_bias,
            decay_first=decay_first,
            stochastic=group["stochastic_rounding"],
            seed=group["seed"],
        )


class FOAM(StateOptimizer):
    """One moment for 2**level neighbours in a row of a hidden matrix; everything else gets plain Adam.

    The moments m and v average the mean gradient of each block. The difference d of an element's gradient from that
    mean is used as it is now: the step goes along (m + d) / sqrt(v + d**2). Such directions are not Adam's.

    Args:
        params: `model.named_parameters()`, so that embeddings and heads are known by name and get plain Adam; or
            parameters or groups, with `matrix` set per group.
        lr: Learning rate, a float or a 0-d tensor.
        betas: Decay rates of the averages of the gradient and of its square, per step.
        eps: What is added to the root of the second moment.
        weight_decay: Weight decay per unit of lr.
        level: Blocks have 2**level elements, and are never wider than a row. 0 folds nothing.
        scale: Factor of the step of folded matrices; alpha in the paper.
        residual_scale: Factor of the difference from the block's mean; rho_r in the paper.
        variant: `safe`: a short block at the end of a row is averaged over its own length, eps is added to the
            corrected root, and decay comes before the step, as in torch.optim.AdamW. `official`, the published code:
            the short block is divided by the full length, eps is in effect eps / sqrt(1 - beta2**t), decay follows the
            step. `paper`: as `official`, but the second moment averages the square of the block's mean gradient, not
            the mean of the squares.
        **options: Options that every optimizer takes; see StateOptimizer. `moments` says how the folded moments, and
            those of other parameters, are stored; by default `dense` (fp32).

    Raises:
        OptimizerError: For an option or a parameter that cannot be taken.

    Source:
        FOAM (arXiv 2512.07112), algorithm 1, and its published code.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(128, 64)
        >>> optimizer = FOAM(model.named_parameters(), lr=1e-2, level=3)
        >>> model(torch.ones(2, 128)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg"].parts["mean.data"].shape
        torch.Size([64, 16])
    """

    algorithm: ClassVar[str] = "foam"
    sees_shapes: ClassVar[bool] = True
    torch_options: ClassVar[dict[str, Any]] = TORCH_ADAM

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        level: int = 2,
        scale: float = 0.25,
        residual_scale: float = 1.0,
        variant: str = "safe",
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "level": level, "scale": scale,
            "residual_scale": residual_scale, "variant": variant,
        }  # fmt: skip
        super().__init__(params, defaults, {"moments": "dense", **options})

    def settle_group(self, group: Group) -> None:
        super().settle_group(group)
        check_adam_group(group)
        check_integer("level", group["level"], 0, 16)
        check_number("scale", group["scale"], 0)
        check_number("residual_scale", group["residual_scale"], 0)
        check_choice("variant", group["variant"], tuple(VARIANTS))
        for state in ("exp_avg", "exp_avg_sq"):
            moment_codec(group["moments"], state)

    def method(self, param: Tensor, name: str | None, group: Group) -> Method:
        if not is_hidden_matrix(param, name, group):
            return AdamMethod()
        if param.dtype == torch.float64:
            raise OptimizerError("FOAM keeps fp32 states; step fp64 parameters with AdamW(moments='dense')")
        widest = (matrix_shape(tuple(param.shape))[1] - 1).bit_length()
        return FoamMethod(min(int(group["level"]), widest))
