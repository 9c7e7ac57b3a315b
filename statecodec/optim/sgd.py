"""SGD with momentum, with L2 decay (SGD) or decoupled decay (SGDW), over an encoded momentum buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from statecodec.errors import OptimizerError
from statecodec.kernels.fused import Hyper
from statecodec.optim.base import StateOptimizer
from statecodec.optim.method import Elementwise, Group, Method, ParameterStep, StateSpec, decay_per_lr
from statecodec.optim.options import Options, check_flags, check_number, moment_codec, stored_codec


class SGDMethod(Elementwise):
    """The arithmetic is `kernels.reference.steps.sgd`; without momentum there is no state."""

    name: ClassVar[str] = "sgd"

    def __init__(self, l2: bool) -> None:
        self._l2 = l2

    def specs(self, param: Tensor, group: Group) -> dict[str, StateSpec]:
        if not group["momentum"]:
            return {}
        codec = stored_codec(param, group, "momentum_buffer")
        return {"momentum_buffer": StateSpec(codec, tuple(param.shape), self.state_dtype(param))}

    def l2(self, group: Group) -> float:
        return float(group["weight_decay"]) if self._l2 else 0.0

    def scalars(self, job: ParameterStep) -> dict[str, Any]:
        group = job.group
        return {
            "lr": job.lr, "momentum": float(group["momentum"]), "dampening": float(group["dampening"]),
            "nesterov": bool(group["nesterov"]), "first": job.t == 1, "decay": 1.0 if self._l2 else job.decay,
        }  # fmt: skip

    def hyper(self, group: Group) -> Hyper | None:
        return Hyper(
            lr=group["lr"],
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            l2=self.l2(group),
            decay=0.0 if self._l2 else decay_per_lr(group),
            maximize=group["maximize"],
            stochastic=group["stochastic_rounding"],
            seed=group["seed"],
        )


class SGD(StateOptimizer):
    """SGD as torch.optim.SGD, over an encoded momentum buffer: the first gradient enters the buffer undampened.

    Args:
        params: Parameters, groups of them, or `model.named_parameters()`.
        lr: Learning rate, a float or a 0-d tensor.
        momentum: How much of the buffer stays, per step; 0 keeps no state.
        dampening: How much of the gradient does not enter the buffer.
        weight_decay: What is added to the gradient, per unit of weight.
        nesterov: Use Nesterov's momentum.
        **options: Options that every optimizer takes; see StateOptimizer.

    Raises:
        OptimizerError: For an option or a parameter that cannot be taken.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(128, 64)
        >>> optimizer = SGD(model.named_parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(2, 128)).square().mean().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[model.weight])
        ['step', 'skipped', 'momentum_buffer']
    """

    algorithm: ClassVar[str] = "sgd"
    torch_options: ClassVar[dict[str, Any]] = {
        "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "foreach": None,
        "differentiable": False, "fused": None,
    }  # fmt: skip
    _l2: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, defaults, options)

    def settle_group(self, group: Group) -> None:
        super().settle_group(group)
        check_number("momentum", group["momentum"], 0)
        check_number("dampening", group["dampening"], 0, 1)
        check_flags(group, "nesterov")
        if group["nesterov"] and (not group["momentum"] or group["dampening"]):
            raise OptimizerError("nesterov needs a momentum and no dampening")
        moment_codec(group["moments"], "momentum_buffer")

    def method(self, param: Tensor, name: str | None, group: Group) -> Method:
        return SGDMethod(self._l2)

    def takes_torch_group(self, group: Mapping[str, Any]) -> bool:
        return "dampening" in group and "nesterov" in group and (self._l2 or not group.get("weight_decay"))


class SGDW(SGD):
    """SGD with decoupled weight decay: each step first multiplies the weight by 1 - lr * weight_decay.

    The other arguments are those of SGD.

    Source:
        Loshchilov and Hutter (arXiv 1711.05101), algorithm 1.
    """

    algorithm: ClassVar[str] = "sgdw"
    _l2: ClassVar[bool] = False
