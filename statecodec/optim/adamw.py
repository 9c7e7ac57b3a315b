"""AdamW and Adam with encoded moments.

Sources: Adam, Kingma and Ba; AdamW, Loshchilov and Hutter; encoded moments, FlashOptim (arXiv 2602.23349, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from statecodec.kernels.fused import Hyper
from statecodec.optim.base import StateOptimizer
from statecodec.optim.method import Elementwise, Group, Method, ParameterStep, StateSpec, decay_per_lr
from statecodec.optim.options import Options, check_betas, check_number, moment_codec, stored_codec

TORCH_ADAM: dict[str, Any] = {
    "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
    "differentiable": False, "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip


class AdamMethod(Elementwise):
    """Adam with decoupled decay, or with L2 decay; the arithmetic is `kernels.reference.steps.adam`."""

    name: ClassVar[str] = "adam"

    def __init__(self, *, l2: bool = False, decays: bool = True, lr_ratio: float = 1.0) -> None:
        self._l2, self._decays, self._lr_ratio = l2, decays, lr_ratio

    def specs(self, param: Tensor, group: Group) -> dict[str, StateSpec]:
        shape, dtype = tuple(param.shape), self.state_dtype(param)
        return {k: StateSpec(stored_codec(param, group, k), shape, dtype) for k in ("exp_avg", "exp_avg_sq")}

    def l2(self, group: Group) -> float:
        return float(group["weight_decay"]) if self._l2 and self._decays else 0.0

    def scalars(self, job: ParameterStep) -> dict[str, Any]:
        lr = job.lr * self._lr_ratio
        decay = 1.0 if self._l2 or not self._decays else 1 - lr * decay_per_lr(job.group)
        return {**adam_scalars(job), "lr": lr, "decay": decay}

    def hyper(self, group: Group) -> Hyper | None:
        beta1, beta2 = (float(b) for b in group["betas"])
        return Hyper(
            # A tensor lr must stay the same object: it tells which parameters may share a launch.
            lr=group["lr"] if self._lr_ratio == 1 else group["lr"] * self._lr_ratio,
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            l2=self.l2(group),
            decay=0.0 if self._l2 or not self._decays else decay_per_lr(group),
            maximize=group["maximize"],
            stochastic=group["stochastic_rounding"],
            seed=group["seed"],
        )


def adam_scalars(job: ParameterStep) -> dict[str, Any]:
    """lr, betas, eps and the bias corrections of this step."""
    beta1, beta2 = (float(b) for b in job.group["betas"])
    return {
        "lr": job.lr, "beta1": beta1, "beta2": beta2, "eps": float(job.group["eps"]),
        "c1": 1 - beta1**job.t, "c2": 1 - beta2**job.t, "decay": job.decay,
    }  # fmt: skip


def check_adam_group(group: Group) -> None:
    """Raise OptimizerError for betas or eps that Adam cannot take."""
    check_betas(group, open_top=True)
    check_number("eps", group["eps"], 0)


def takes_torch_adam(group: Mapping[str, Any], l2: bool) -> bool:
    """Whether a torch.optim group is Adam's or AdamW's with the same kind of weight decay."""
    decoupled = bool(group.get("decoupled_weight_decay", not l2))
    return "betas" in group and "amsgrad" in group and (decoupled != l2 or not group.get("weight_decay"))


class Adam(StateOptimizer):
    """Adam with L2 weight decay (through the gradient), as torch.optim.Adam, over encoded moments.

    Args:
        params: Parameters, groups of them, or `model.named_parameters()`.
        lr: Learning rate, a float or a 0-d tensor.
        betas: Decay rates of the averages of the gradient and of its square, per step.
        eps: What is added to the root of the second moment.
        weight_decay: What is added to the gradient, per unit of weight.
        **options: Options that every optimizer takes; see StateOptimizer.

    Raises:
        OptimizerError: For an option or a parameter that cannot be taken.

    Source:
        Kingma and Ba (arXiv 1412.6980); encoded moments: FlashOptim (arXiv 2602.23349), section 3.
    """

    algorithm: ClassVar[str] = "adam"
    torch_options: ClassVar[dict[str, Any]] = {**TORCH_ADAM, "decoupled_weight_decay": False}
    _l2: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, options)

    def settle_group(self, group: Group) -> None:
        super().settle_group(group)
        check_adam_group(group)
        for state in ("exp_avg", "exp_avg_sq"):
            moment_codec(group["moments"], state)

    def method(self, param: Tensor, name: str | None, group: Group) -> Method:
        return AdamMethod(l2=self._l2)

    def takes_torch_group(self, group: Mapping[str, Any]) -> bool:
        return takes_torch_adam(group, self._l2)


class AdamW(Adam):
    """Adam with decoupled weight decay, as torch.optim.AdamW, over encoded moments and split master weights.

    FlashOptim's optimizer with these deviations: groups of 32 run inside a row, scales are bf16 and used as stored, a
    positive second moment never gets code 0, and the split is integer arithmetic. A bf16 parameter takes 2 (weight) + 1
    (low part) + 2.125 (moments) bytes, and 2 for the gradient until gradient release.

    Args:
        params: Parameters, groups of them, or `model.named_parameters()`.
        lr: Learning rate, a float or a 0-d tensor.
        betas: Decay rates of the averages of the gradient and of its square, per step.
        eps: What is added to the root of the second moment.
        weight_decay: Weight decay per unit of lr.
        **options: Options that every optimizer takes; see StateOptimizer.

    Raises:
        OptimizerError: For an option or a parameter that cannot be taken.

    Source:
        Loshchilov and Hutter (arXiv 1711.05101); encoded moments: FlashOptim (arXiv 2602.23349), section 3.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(128, 64)
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 128)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg"].codec.name
        'companded'
        >>> optimizer.state_nbytes() < 2.2 * 128 * 64 + 9 * 64  # bytes: 8-bit matrix moments, an exact bias
        True
    """

    algorithm: ClassVar[str] = "adamw"
    torch_options: ClassVar[dict[str, Any]] = TORCH_ADAM
    _l2: ClassVar[bool] = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)
