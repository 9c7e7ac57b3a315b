"""The optimizer that every class here is: torch's interface over states kept in encoded form.

Where a step would not be finite, the smallest unit that shares a stored number keeps its old bytes and is counted in
`skipped` (see `units`): it would otherwise spread over a group, a block, a row or a whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from statecodec import kernels
from statecodec.errors import OptimizerError
from statecodec.kernels.reference import steps as reference_steps
from statecodec.optim import fusing, loading, pooling, saving, sharding
from statecodec.optim.load_report import LoadReport
from statecodec.optim.method import LOW, Group, ParameterStep, PerParameter, Recipe, dense_gradient
from statecodec.optim.options import (
    check_choice,
    check_flags,
    check_fusable,
    check_integer,
    check_number,
    check_param,
    check_whole,
    plain_moments,
)
from statecodec.optim.owners import step_matrices
from statecodec.optim.states import StateKeeper
from statecodec.optim.weights import MASTER_WEIGHTS, Dither, StoredWeight, whole


class Options(TypedDict, total=False):
    """What every optimizer takes by keyword; the meanings are in StateOptimizer."""

    moments: object
    master_weights: str | None
    stochastic_rounding: bool
    decouple_lr: bool
    maximize: bool
    dense_below: int
    seed: int
    matrix: bool | None
    backend: str | None
    fused: bool | None


COMMON: dict[str, Any] = {
    "moments": "companded8", "master_weights": "split24", "stochastic_rounding": False, "decouple_lr": False,
    "maximize": False, "dense_below": 4096, "seed": 0, "matrix": None, "backend": None, "fused": None,
}  # fmt: skip


class StateOptimizer(StateKeeper):
    """Base of all optimizers; the options that they share.

    Args:
        params: parameters, groups, or `model.named_parameters()` (FOAM, SlimAdam, LoRAPre and Muon choose by name).
        lr: learning rate, a float or a 0-d tensor.
        weight_decay: per unit of lr; with `decouple_lr` it is per step at the initial lr and only follows the
            schedule's shape.
        moments: `companded8`, `dense`, a codec, or {state: codec}: how full-size moments are stored.
        master_weights: `split24`, `split32` or None: what bf16 and fp16 parameters are extended with. fp32 ones need
            nothing.
        stochastic_rounding: round what the stored weight drops stochastically (split24 and plain bf16), reproducibly
            from `seed`.
        maximize: ascend instead of descend.
        dense_below: parameters with fewer elements keep exact moments.
        matrix: True or False overrides the choice by name of what is a hidden matrix (FOAM, LoRAPre, Muon).
        backend: codec kernels to use (`reference`, `cpu`, `triton`); by default those of the parameter's device.
        fused: True demands fused steps (parameters must be on a GPU by then), False forbids them, None uses them on
            GPUs where there is one.

    All options but `backend` and `fused` may be set per param group.
    """

    load_report: LoadReport

    def __init__(self, params: Any, defaults: Mapping[str, Any], options: Options) -> None:
        given = {**COMMON, **options}
        if given.keys() != COMMON.keys():
            raise OptimizerError(f"no option {sorted(given.keys() - COMMON)}; the common ones are {', '.join(COMMON)}")
        self._backend, self._fused = cast(str | None, given.pop("backend")), cast(bool | None, given.pop("fused"))
        if self._backend is not None:
            kernels.get(self._backend)
        self.load_report = LoadReport()
        self._reset_runtime()
        super().__init__(params, {**defaults, **given, "algorithm": self.algorithm})
        if self.sees_shapes:
            check_whole(self.parameters())

    def check_group(self, group: Group) -> None:
        check_number("lr", group["lr"], 0)
        check_number("weight_decay", group["weight_decay"], 0)
        check_flags(group, "decouple_lr", "maximize", "stochastic_rounding")
        check_integer("dense_below", group["dense_below"], 0, 2**63)
        check_integer("seed", group["seed"], -(2**63), 2**63)
        check_choice("master_weights", group["master_weights"], MASTER_WEIGHTS)
        if group["matrix"] is not None:
            check_flags(group, "matrix")
        group["moments"] = plain_moments(group["moments"])
        if group["decouple_lr"]:
            group.setdefault("initial_lr", float(group["lr"]))
            check_number("initial_lr (decouple_lr divides by it)", group["initial_lr"], 1e-45)
        for p in group["params"]:
            check_param(p)
            if self._fused:
                check_fusable(p)
            if group["stochastic_rounding"] and p.dtype == torch.float16:
                raise OptimizerError("stochastic_rounding is for bf16 parameters; fp16's grid is uneven, use split32")

    # --- stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step; `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_params(group["params"], group, id(group))
        return loss

    @torch.no_grad()
    def step_param(self, param: Tensor) -> None:
        """Step one parameter from its `.grad`; gradient release calls it during the backward pass."""
        self._step_params([param], self.group_of(param), param)

    def _step_params(self, params: Sequence[Tensor], group: Group, key: Any) -> None:
        """Fused steps, then batches of matrices, then what is left one by one; `key` as in `fusing.step_group`."""
        self._step_each(step_matrices(self, group, fusing.step_group(self, group, params, key)), group)

    def _step_each(self, params: Sequence[Tensor], group: Group) -> None:
        """Step parameters one by one; while the ranks add up what some of them need, the others are stepped."""
        crossing = [p for p in params if self.recipe(p, group).across]
        sums = pooling.start([self.recipe(p, group) for p in crossing], [self._gradient(p) for p in crossing])
        waiting = set(crossing)
        for p in params:
            if p not in waiting:
                self._step_one(p, group)
        for p, pooled in zip(crossing, sums(), strict=True):
            self._step_one(p, group, pooled)

    def _gradient(self, p: Tensor) -> Tensor:
        """What this rank holds of a parameter's gradient."""
        return sharding.gradient(p, dense_gradient(p))

    def _step_one(self, p: Tensor, group: Group, pooled: Tensor | None = None) -> None:
        grad = self._gradient(p)
        recipe, state = self.recipe(p, group), self.ensure_state(p, group)
        state["step"] += 1
        t = int(state["step"])
        own = sharding.local(p)
        work = own.detach().contiguous()
        job = ParameterStep(
            recipe=recipe, weight=self._weight(p, work, recipe, group, t), grad=grad.detach().contiguous(),
            states={k: sharding.own_part(state[k], p) for k in recipe.specs}, group=group, t=t, scratch=self._scratch,
            backend=kernels.resolve(self._backend, work.device), arithmetic=self._arithmetic(work), pooled=pooled,
        )  # fmt: skip
        state["skipped"] += cast(PerParameter, recipe.method).step(job)
        if work.data_ptr() != own.data_ptr():
            own.copy_(work)

    def _weight(self, p: Tensor, work: Tensor, recipe: Recipe, group: Group, t: int) -> StoredWeight:
        low = self.state[p].get(LOW) if p in self.state else None
        start = sharding.first_element(p) if group["stochastic_rounding"] else 0
        dither = Dither(group["seed"], recipe.index, t, start) if group["stochastic_rounding"] else None
        return StoredWeight(
            work, None if low is None else sharding.local(low.parts["data"]), recipe.split, dither,
            self._scratch, kernels.resolve(self._backend, work.device), self._arithmetic(work),
        )  # fmt: skip

    def _arithmetic(self, p: Tensor) -> Any:
        if p.device.type == "cpu" and self._backend in (None, "cpu"):
            from statecodec.kernels.cpu import steps as cpu_steps

            return cpu_steps
        return reference_steps

    def skipped(self) -> dict[str | int, int]:
        """How many units kept their old bytes because their step was not finite, by parameter name (or position); only
        parameters with any. A unit is an element, a group, a block of a folded moment or a matrix (see `units`)."""
        counts = {self.label(p): int(self.state[p]["skipped"]) for p in self.parameters() if self.state.get(p)}
        return {k: n for k, n in counts.items() if n}

    # --- full-precision weights

    @torch.no_grad()
    def master_weight(self, p: Tensor) -> Tensor:
        """A copy of the weight as the optimizer sees it: fp32 (fp64 for fp64 parameters), the parameter's shape and
        place."""
        group = self.group_of(p)
        if self.state.get(p):
            self.ensure_state(p, group)
        work = sharding.local(p).detach().contiguous()
        weight = self._weight(p, work, self.recipe(p, group), group, 0)
        return sharding.joined(weight.load(whole(work)).clone().view(work.shape), p)

    @torch.no_grad()
    def set_master_weight(self, p: Tensor, value: Tensor) -> None:
        """Set parameter and low part from a full-precision weight (rounded to nearest): an fp32 checkpoint loses
        nothing that the split can hold. Of a sharded parameter it may be whole or a DTensor. Raises OptimizerError for
        another shape."""
        if value.shape != p.shape:
            raise OptimizerError(f"a master weight of shape {tuple(value.shape)} for a parameter of {tuple(p.shape)}")
        group = self.group_of(p)
        self.ensure_state(p, group)
        own, value = sharding.local(p), sharding.sliced(value.detach(), p)
        work = own.detach().contiguous()
        if work.dtype in (torch.float32, torch.float64):
            work.copy_(value)
        else:
            weight = self._weight(p, work, self.recipe(p, group), {**group, "stochastic_rounding": False}, 0)
            weight.store(whole(work), value.to(device=work.device, dtype=torch.float32).contiguous())
        if work.data_ptr() != own.data_ptr():
            own.copy_(work)

    # --- torch's interface

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises OptimizerError for parameters or options that cannot be taken."""
        super().add_param_group(param_group)
        try:
            self.accept_group(self.param_groups[-1])
        except OptimizerError:
            self.param_groups.pop()
            raise

    def state_dict(self, dense: bool = False) -> dict[str, Any]:
        """The state as plain values: every encoded state in the form of `codecs.plain`, sharing memory with the live
        one.

        `dense=True`: decoded to fp32 under torch.optim's names, with torch.optim's group options, for the torch class
        of the same name (FOAM, SlimAdam and LoRAPre: AdamW). Master weights are not part of it; see `master_weight`.
        Nothing of the optimizer changes meanwhile, so another thread may step it: what is saved then is some mixture of
        before and after.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = saving.dense(self) if dense else saving.plain(self)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load our own state (bit for bit), a torch.optim state (encoded on the way in), or another optimizer's.

        The storage options (`moments`, `master_weights`, levels, ranks, rules) stay as constructed, the others are
        taken over if they mean the same here. `load_report` then says what was converted and what that lost. Raises
        OptimizerError.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.load_report = loading.load(self, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_backend": self._backend, "_fused": self._fused, "load_report": self.load_report}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch puts it in; no option here has that name
        self._reset_runtime()
