"""LoRA-Pre: moments as products of two thin factors, which follow the moving average by Newton iterations.

Source: arXiv 2602.24283, theorem 3.1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from statecodec.codecs import EncodedTensor, LowRank
from statecodec.errors import OptimizerError
from statecodec.kernels.fused import LARGEST
from statecodec.kernels.reference.steps import mix
from statecodec.optim import sharding
from statecodec.optim.adamw import TORCH_ADAM, AdamMethod, check_adam_group
from statecodec.optim.base import StateOptimizer
from statecodec.optim.hidden_matrix import is_hidden_matrix
from statecodec.optim.matrices import Batch, Stacked, WholeMatrix
from statecodec.optim.method import Group, Method, Recipe, StateSpec, matrix_shape
from statecodec.optim.muon import check_muon_group, newton_schulz, step_size
from statecodec.optim.options import Options, check_choice, check_integer, check_number, moment_codec

INIT_STD = 0.02
# (factor update, damping relative to the Gram's mean eigenvalue, damping, cap)
VARIANTS = {"safe": ("gauss_seidel", True, 1e-4, True), "paper": ("jacobi", False, 1e-6, False)}


def track(
    left: Tensor, right: Tensor, target: Tensor, keep: float, *, jacobi: bool, relative: bool, damping: float, cap: bool
) -> None:
    """Move two factors in place, so that their product follows a moving average of the targets.

    With B = `left`, A = `right`, T = `target`:
    B' = keep B + (1 - keep) T A^T (A A^T)^-1, then A' = keep A + (1 - keep) (B^T B)^-1 B^T T.

    Args:
        left: (..., p, r), fp32.
        right: (..., r, q), fp32.
        target: (..., p, q), fp32.
        keep: how much of the factors stays. At full rank the product is then the average with beta = keep**2.
        jacobi: A' is computed from the old B, as the paper prints it, which overshoots when targets grow; otherwise
            from B' (Gauss-Seidel).
        relative: damping is a share of the mean eigenvalue of A A^T and B^T B. The scale that both factors share is
            then free, and is moved so that A has an rms of 1: after many targets of zero it would underflow for good.
        damping: added to the diagonals of A A^T and B^T B before they are inverted.
        cap: the norm of the product is at most keep**2 times its old one plus (1 - keep**2) times the target's.
    """
    limit = None
    if cap:
        limit = keep**2 * _product_norm(left, right) + (1 - keep**2) * torch.linalg.matrix_norm(target)
    old = left.clone() if jacobi else left
    solved = _solve(right.mT, target.mT, relative, damping).mT
    left.mul_(keep).add_(solved, alpha=1 - keep)
    solved = _solve(old, target, relative, damping)
    if jacobi:  # an all-zero B gives no target for A; A must not shrink then
        empty = (old == 0).flatten(-2).all(-1)[..., None, None]
        right.mul_(torch.where(empty, right.new_ones(()), keep)).add_(solved, alpha=1 - keep)
    else:
        right.mul_(keep).add_(solved, alpha=1 - keep)
    if limit is not None:
        norm = _product_norm(left, right)
        left.mul_((limit / norm.clamp(min=1e-37)).clamp(max=1.0)[..., None, None])
    if relative:
        rms = right.square().mean((-2, -1), keepdim=True).sqrt()
        rms = torch.where(rms > 0, rms, torch.ones_like(rms))
        right.div_(rms)
        left.mul_(rms)


def _solve(basis: Tensor, target: Tensor, relative: bool, damping: float) -> Tensor:
    """(basis^T basis + damping)^-1 basis^T target for basis (..., n, r), target (..., n, k): r x r work in fp32."""
    size = basis.abs().amax((-2, -1), keepdim=True) if relative else torch.ones_like(basis[..., :1, :1])
    size = torch.where(size > 0, size, torch.ones_like(size))
    basis = basis / size  # so that the Gram matrix neither underflows nor overflows
    gram = basis.mT @ basis
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    wanted = mean * damping if relative else torch.full_like(mean, damping)
    diagonal.add_(torch.where(mean > 0, wanted, torch.ones_like(mean)))  # an all-zero basis: the solution is zero
    # Matrices that are singular up to rounding get enough damping to be regular; the host does not look.
    _, info = torch.linalg.cholesky_ex(gram)
    enough = mean * (gram.shape[-1] ** 2 * torch.finfo(gram.dtype).eps)
    diagonal.add_(torch.where(info[..., None] > 0, enough, torch.zeros_like(enough)))
    factor, info = torch.linalg.cholesky_ex(gram)
    half = torch.linalg.solve_triangular(factor, basis.mT @ target, upper=False)
    solved = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return torch.where(info[..., None, None] > 0, torch.zeros_like(solved), solved / size)


def product(state: Stacked) -> Tensor:
    """left @ right, (count, rows, cols)."""
    return state.parts["left"] @ state.parts["right"]


def _product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius norm of left @ right, without forming it; scaled first, for fp32's range."""
    a, b = (x.abs().amax((-2, -1), keepdim=True).clamp(min=1e-37) for x in (left, right))
    left, right = left / a, right / b
    square = ((left.mT @ left) * (right @ right.mT)).sum((-2, -1))
    return square.clamp(min=0).sqrt() * (a * b)[..., 0, 0]


class _LowRankMethod(WholeMatrix):
    """Base of Adam and Muon over low-rank moments: how the factors start and are updated."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def init(self, param: Tensor, recipe: Recipe, group: Group) -> dict[str, EncodedTensor]:
        """Factors B = 0 and A ~ N(0, 0.02**2), drawn from (seed, parameter, state).

        The first gradient is projected onto A's rows.
        """
        states = super().init(param, recipe, group)
        for k, (name, state) in enumerate(states.items()):
            generator = torch.Generator("cpu").manual_seed(mix(int(group["seed"]) + mix(2 * recipe.index + k)))
            right = sharding.local(state.parts["right"])
            right.copy_(torch.randn(right.shape, generator=generator, dtype=torch.float32, device="cpu") * INIT_STD)
            states[name] = state
        return states

    def view_shape(self, param: Tensor) -> tuple[int, ...]:
        return matrix_shape(tuple(param.shape))

    def track(self, batch: Batch, name: str, target: Tensor, keep: float) -> None:
        """Move the factors of one state, which is stored if they stay finite."""
        group, state = batch.group, batch.states[name]
        update, relative, damping, cap = VARIANTS[group["variant"]]
        update = group["factor_update"] or update
        damping = damping if group["damping"] is None else float(group["damping"])
        factors = {k: x.clone() for k, x in state.parts.items()}
        track(
            factors["left"],
            factors["right"],
            target,
            keep,
            jacobi=update == "jacobi",
            relative=relative,
            damping=damping,
            cap=cap,
        )
        for factor in factors.values():
            batch.require(factor, LARGEST)
        state.replace(factors)


class LowRankAdamMethod(_LowRankMethod):
    """Adam's step from the old factors and the new gradient, at full rank; then the factors move.

    `exp_avg_sq` is (left @ right)**2: the factors follow |g| with sqrt(beta2), and their product is squared.
    """

    name: ClassVar[str] = "lorapre_adam"

    def specs(self, param: Tensor, group: Group) -> dict[str, StateSpec]:
        shape = self.view_shape(param)
        forms = {"exp_avg": "product", "exp_avg_sq": "square"}
        return {k: StateSpec(LowRank(self._rank, form), shape, torch.float32) for k, form in forms.items()}

    def update(self, batch: Batch) -> None:
        g, w, group, t = batch.gradient, batch.weight, batch.group, batch.t
        beta1, beta2 = (float(b) for b in group["betas"])
        first = product(batch.states["exp_avg"]).lerp_(g, 1 - beta1)
        second = product(batch.states["exp_avg_sq"]).square_().mul_(beta2).addcmul_(g, g, value=1 - beta2)
        self.track(batch, "exp_avg", g, beta1**0.5)
        c2 = 1 - beta2**t
        if group["bias_correction"] == "matched":
            c2 = beta2 * (1 - beta2 ** ((t - 1) / 2)) ** 2 + 1 - beta2
        size = batch.lr * float(group["scale"]) / (1 - beta1**t)
        step = first.div_(second.sqrt_().div_(c2.sqrt().to(w.dtype)).add_(float(group["eps"])))
        w.mul_(batch.decay).sub_(step.mul_(size.to(w.dtype)))
        self.track(batch, "exp_avg_sq", g.abs_(), beta2**0.25)


class LowRankMuonMethod(_LowRankMethod):
    """Muon's step from mu * (left @ right) + g; the factors follow the momentum buffer, an average of g / (1 - mu)."""

    name: ClassVar[str] = "lorapre_muon"

    def specs(self, param: Tensor, group: Group) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec(LowRank(self._rank), self.view_shape(param), torch.float32)}

    def update(self, batch: Batch) -> None:
        g, group = batch.gradient, batch.group
        mu = float(group["momentum"])
        update = newton_schulz(product(batch.states["momentum_buffer"]).mul_(mu).add_(g), int(group["ns_steps"]))
        self.track(batch, "momentum_buffer", g.div_(1 - mu), mu**0.5)
        batch.weight.mul_(batch.decay).sub_(update.mul_(batch.lr * step_size(group, *g.shape[1:])))


class LoRAPre(StateOptimizer):
    """Low-rank moments for hidden matrices whose smaller side exceeds the rank; AdamW for everything else.

    Args:
        params: `model.named_parameters()`, so that embeddings and heads are known by name and get AdamW; or parameters
            or groups, with `matrix` set per group.
        lr: Learning rate, a float or a 0-d tensor.
        betas: Decay rates of the averages of the gradient and of its square, per step.
        eps: What is added to the root of the second moment.
        weight_decay: Weight decay per unit of lr.
        rank: Rank of the factors. An Adam matrix of (p, q) takes 8 (p + q) rank bytes, a Muon matrix half of that.
        base: `adam` or `muon`, the rule that the low-rank moments are used by.
        scale: Factor of the step of low-rank Adam matrices (0.25 in the paper); Muon has `adjust` instead.
        variant: `safe`: the second factor is computed from the new first one, damping is 1e-4 of the mean eigenvalue,
            and the product's norm is capped. `paper`, as printed: both factors are computed from the old ones, which
            overshoots when gradients grow; damping is 1e-6, which loses small gradients; no cap.
        factor_update: `gauss_seidel` or `jacobi`, in place of the variant's.
        damping: A number in place of the variant's.
        bias_correction: `paper` divides the second moment by 1 - beta2**t; `matched` by what the squared low-rank
            average amounts to after t steps. The paper's makes early steps larger, so `matched` needs another lr.
        momentum: Muon's, where `base` is `muon`.
        ns_steps: Muon's, where `base` is `muon`.
        adjust: Muon's, where `base` is `muon`.
        **options: Options that every optimizer takes; see StateOptimizer. `moments` says how the moments of other
            parameters are stored. Factors are always fp32: inverting A A^T would amplify their rounding.

    Raises:
        OptimizerError: For an option or a parameter that cannot be taken.

    Source:
        LoRA-Pre (arXiv 2602.24283), algorithms 1 and 2, theorem 3.1.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(128, 64)
        >>> optimizer = LoRAPre(model.named_parameters(), lr=1e-3, rank=4)
        >>> model(torch.ones(2, 128)).square().mean().backward()
        >>> optimizer.step()
        >>> {name: tuple(part.shape) for name, part in optimizer.state[model.weight]["exp_avg"].parts.items()}
        {'left': (64, 4), 'right': (4, 128)}
    """

    algorithm: ClassVar[str] = "lorapre"
    sees_shapes: ClassVar[bool] = True
    torch_options: ClassVar[dict[str, Any]] = TORCH_ADAM

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int = 16,
        base: str = "adam",
        scale: float = 0.25,
        variant: str = "safe",
        factor_update: str | None = None,
        damping: float | None = None,
        bias_correction: str = "paper",
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust: str = "match_rms_adamw",
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "base": base,
            "scale": scale, "variant": variant, "factor_update": factor_update, "damping": damping,
            "bias_correction": bias_correction,
            "momentum": momentum, "ns_steps": ns_steps, "adjust": adjust,
        }  # fmt: skip
        super().__init__(params, defaults, options)

    def settle_group(self, group: Group) -> None:
        super().settle_group(group)
        check_adam_group(group)
        check_muon_group(group)
        check_integer("rank", group["rank"], 1, 65536)
        check_number("scale", group["scale"], 0)
        if group["damping"] is not None:
            check_number("damping", group["damping"], 0)
        choices = {
            "base": ("adam", "muon"), "variant": tuple(VARIANTS), "bias_correction": ("paper", "matched"),
            "factor_update": (None, "gauss_seidel", "jacobi"),
        }  # fmt: skip
        for key, legal in choices.items():
            check_choice(key, group[key], legal)
        for state in ("exp_avg", "exp_avg_sq"):
            moment_codec(group["moments"], state)

    def method(self, param: Tensor, name: str | None, group: Group) -> Method:
        rank = int(group["rank"])
        if not is_hidden_matrix(param, name, group) or min(matrix_shape(tuple(param.shape))) <= rank:
            return AdamMethod()
        if param.dtype == torch.float64:
            raise OptimizerError("LoRAPre keeps fp32 factors; step fp64 parameters with AdamW(moments='dense')")
        return LowRankAdamMethod(rank) if group["base"] == "adam" else LowRankMuonMethod(rank)
