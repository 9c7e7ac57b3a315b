"""Lion (Chen et al. 2023, arXiv 2302.06675) over an encoded momentum."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from statecodec.kernels.fused import Hyper
from statecodec.optim.base import StateOptimizer
from statecodec.optim.method import Elementwise, Group, Method, ParameterStep, StateSpec, decay_per_lr
from statecodec.optim.options import Options, check_betas, moment_codec, stored_codec


class LionMethod(Elementwise):
    """The arithmetic is `kernels.reference.steps.lion`."""

    name: ClassVar[str] = "lion"

    def specs(self, param: Tensor, group: Group) -> dict[str, StateSpec]:
        codec = stored_codec(param, group, "exp_avg")
        return {"exp_avg": StateSpec(codec, tuple(param.shape), self.state_dtype(param))}

    def scalars(self, job: ParameterStep) -> dict[str, Any]:
        beta1, beta2 = (float(b) for b in job.group["betas"])
        return {"lr": job.lr, "beta1": beta1, "beta2": beta2, "decay": job.decay}

    def hyper(self, group: Group) -> Hyper | None:
        beta1, beta2 = (float(b) for b in group["betas"])
        return Hyper(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            decay=decay_per_lr(group),
            maximize=group["maximize"],
            stochastic=group["stochastic_rounding"],
            seed=group["seed"],
        )


class Lion(StateOptimizer):
    """The sign of an interpolated momentum, with decoupled weight decay, over an encoded momentum.

    Args:
        params: Parameters, groups of them, or `model.named_parameters()`.
        lr: Learning rate, a float or a 0-d tensor.
        betas: How much of the momentum the interpolation has, and how much of it stays, per step.
        weight_decay: Weight decay per unit of lr.
        **options: Options that every optimizer takes; see StateOptimizer.

    Raises:
        OptimizerError: For an option or a parameter that cannot be taken.

    Source:
        Chen et al. 2023 (arXiv 2302.06675).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(128, 64)
        >>> optimizer = Lion(model.named_parameters(), lr=1e-4)
        >>> model(torch.ones(2, 128)).square().mean().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[model.weight])
        ['step', 'skipped', 'exp_avg']
    """

    algorithm: ClassVar[str] = "lion"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, options)

    def settle_group(self, group: Group) -> None:
        super().settle_group(group)
        check_betas(group, open_top=False)
        moment_codec(group["moments"], "exp_avg")

    def method(self, param: Tensor, name: str | None, group: Group) -> Method:
        return LionMethod()
