"""torch's optimizer interface over states that are kept in encoded form; the base of every optimizer here.

Where a step would not be finite, the smallest unit that shares a stored number keeps its old bytes and is counted in
`skipped` (see `units`). Otherwise the value would spread over a group, a block, a row or a whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from statecodec import kernels
from statecodec.errors import OptimizerError
from statecodec.kernels.reference import steps as reference_steps
from statecodec.optim import fusing, loading, pooling, saving, sharding
from statecodec.optim.load_report import LoadReport
from statecodec.optim.method import LOW, Group, ParameterStep, PerParameter, Recipe, dense_gradient
from statecodec.optim.options import (
    COMMON,
    Options,
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
from statecodec.optim.watched import WatchedStates
from statecodec.optim.weights import MASTER_WEIGHTS, Dither, StoredWeight, whole


class StateOptimizer(StateKeeper):
    """Base of all optimizers.

    All of the options can be set per param group, except `backend` and `fused`:

    - `moments`: how full-size moments are stored: `companded8`, `dense`, a codec, or {state: codec}.
    - `master_weights`: what bf16 and fp16 parameters are extended with: `split24`, `split32` or None. fp32 parameters
    need nothing.
    - `stochastic_rounding`: round stochastically what the stored weight drops (split24 and plain bf16), reproducibly
    from `seed`.
    - `decouple_lr`: `weight_decay` is per step at the initial lr, and only follows the shape of the schedule.
    - `maximize`: ascend instead of descend.
    - `dense_below`: parameters with fewer elements keep exact moments.
    - `seed`: of stochastic rounding, and of LoRAPre's factors.
    - `matrix`: True or False overrides the choice by name of what is a hidden matrix (FOAM, LoRAPre, Muon).
    - `backend`: the codec kernels to use: `reference`, `cpu` or `triton`; by default those of the parameter's device.
    - `fused`: True demands fused steps (parameters must be on a GPU by then), False forbids them, None uses them on
    GPUs where there is one.

    Args:
        params: Parameters, groups, or `model.named_parameters()` (FOAM, SlimAdam, LoRAPre and Muon choose by name).
        defaults: The subclass's own options, with lr (a float or a 0-d tensor) and weight_decay (per unit of lr).
        options: The options above.

    Raises:
        OptimizerError: For an option or a parameter that cannot be taken.
        BackendUnavailable: For a backend that is not there.
    """

    load_report: LoadReport

    def __init__(self, params: Any, defaults: Mapping[str, Any], options: Options) -> None:
        settings = {**COMMON, **options}
        if settings.keys() != COMMON.keys():
            raise OptimizerError(
                f"no option {sorted(settings.keys() - COMMON)}; the common ones are {', '.join(COMMON)}"
            )
        self._backend, self._fused = cast(str | None, settings.pop("backend")), cast(bool | None, settings.pop("fused"))
        if self._backend is not None:
            kernels.get(self._backend)
        self.load_report = LoadReport()
        self._reset_runtime()
        super().__init__(params, {**defaults, **settings, "algorithm": self.algorithm})
        self.state = WatchedStates(dict)
        if self.sees_shapes:
            check_whole(self.parameters())

    def settle_group(self, group: Group) -> None:
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

    @_disable_dynamo  # its kernels are compiled already: torch.compile leaves the step as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            OptimizerError: For a sparse gradient, or states that do not fit their parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_params(group["params"], group, id(group))
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def step_param(self, param: Tensor) -> None:
        """Step one parameter from its `.grad`; gradient release calls it during the backward pass.

        Args:
            param: A parameter of this optimizer.

        Raises:
            OptimizerError: If it belongs to no group, or as `step` does.
        """
        self._step_params([param], self.group_of(param), param)

    def _step_params(self, params: Sequence[Tensor], group: Group, key: Any) -> None:
        """Step fused groups, then batches of matrices, then the rest one by one; `key` as in `fusing.step_group`."""
        self._step_each(step_matrices(self, group, fusing.step_group(self, group, params, key)), group)

    def _step_each(self, params: Sequence[Tensor], group: Group) -> None:
        """Step parameters one by one; those that wait for a sum over ranks are stepped last."""
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
        shard = sharding.local(p)
        work = shard.detach().contiguous()
        job = ParameterStep(
            recipe=recipe,
            weight=self._weight(p, work, recipe, group, t),
            grad=grad.detach().contiguous(),
            states={k: sharding.own_part(state[k], p) for k in recipe.specs},
            group=group,
            t=t,
            scratch=self._scratch,
            backend=kernels.resolve(self._backend, work.device),
            arithmetic=self._arithmetic(work),
            pooled=pooled,
        )
        state["skipped"] += cast(PerParameter, recipe.method).step(job)
        if work.data_ptr() != shard.data_ptr():
            shard.copy_(work)

    def _weight(self, p: Tensor, work: Tensor, recipe: Recipe, group: Group, t: int) -> StoredWeight:
        low = self.state[p].get(LOW) if p in self.state else None
        start = sharding.first_element(p) if group["stochastic_rounding"] else 0
        dither = Dither(group["seed"], recipe.index, t, start) if group["stochastic_rounding"] else None
        return StoredWeight(
            work,
            None if low is None else sharding.local(low.parts["data"]),
            recipe.split,
            dither,
            self._scratch,
            kernels.resolve(self._backend, work.device),
            self._arithmetic(work),
        )

    def _arithmetic(self, p: Tensor) -> Any:
        if p.device.type == "cpu" and self._backend in (None, "cpu"):
            from statecodec.kernels.cpu import steps as cpu_steps

            return cpu_steps
        return reference_steps

    def skipped(self) -> dict[str | int, int]:
        """How many units kept their old bytes because their step was not finite.

        A unit is an element, a group, a block of a folded moment or a matrix (see `units`).

        Returns:
            Counts by parameter name (or position), of the parameters that have any.
        """
        counts = {self.label(p): int(self.state[p]["skipped"]) for p in self.parameters() if self.state.get(p)}
        return {k: n for k, n in counts.items() if n}

    # --- full-precision weights

    @torch.no_grad()
    def master_weight(self, p: Tensor) -> Tensor:
        """A copy of a weight as the optimizer sees it.

        Args:
            p: A parameter of this optimizer.

        Returns:
            fp32 (fp64 for fp64 parameters), of the parameter's shape, on its device; a DTensor where the parameter is
            one.

        Raises:
            OptimizerError: If it belongs to no group.
        """
        group = self.group_of(p)
        if self.state.get(p):
            self.ensure_state(p, group)
        work = sharding.local(p).detach().contiguous()
        weight = self._weight(p, work, self.recipe(p, group), group, 0)
        return sharding.joined(weight.load(whole(work)).clone().view(work.shape), p)

    @torch.no_grad()
    def set_master_weight(self, p: Tensor, value: Tensor) -> None:
        """Set a parameter and its low part from a full-precision weight, rounded to nearest.

        An fp32 checkpoint loses nothing that the split can hold.

        Args:
            p: A parameter of this optimizer.
            value: The weight, of any float dtype, of the parameter's shape. Of a sharded parameter it may be whole or a
                DTensor.

        Raises:
            OptimizerError: If the shape is another, or the parameter belongs to no group.
        """
        if value.shape != p.shape:
            raise OptimizerError(f"a master weight of shape {tuple(value.shape)} for a parameter of {tuple(p.shape)}")
        group = self.group_of(p)
        self.ensure_state(p, group)
        shard, value = sharding.local(p), sharding.sliced(value.detach(), p)
        work = shard.detach().contiguous()
        if work.dtype in (torch.float32, torch.float64):
            work.copy_(value)
        else:
            weight = self._weight(p, work, self.recipe(p, group), {**group, "stochastic_rounding": False}, 0)
            weight.store(whole(work), value.to(device=work.device, dtype=torch.float32).contiguous())
        if work.data_ptr() != shard.data_ptr():
            shard.copy_(work)

    # --- torch's interface

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch.

        Args:
            param_group: `params`, and options in place of the defaults.

        Raises:
            OptimizerError: For an option or a parameter that cannot be taken; the group is not added then.
        """
        super().add_param_group(param_group)
        try:
            self.accept_group(self.param_groups[-1])
        except OptimizerError:
            self.param_groups.pop()
            raise

    def state_dict(self, dense: bool = False) -> dict[str, Any]:
        """The state as plain values that torch.save and `statecodec.save` take.

        Nothing of the optimizer changes meanwhile, so another thread may step it; what is saved then is a mixture of
        before and after.

        Args:
            dense: False: every encoded state in the form of `codecs.plain`, sharing memory with the live one. True:
                decoded to fp32 under torch.optim's names, with torch.optim's group options, for the torch class of the
                same name (FOAM, SlimAdam and LoRAPre: AdamW).

        Returns:
            A dict with `state` and `param_groups`. Master weights are not part of it; see `master_weight`.
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

        The storage options (`moments`, `master_weights`, levels, ranks, rules) stay as constructed; the others are
        taken over if they mean the same here. `load_report` then says what was converted and what that lost.

        Args:
            state_dict: What `state_dict` gave, here, in torch.optim or in FlashOptim.

        Raises:
            OptimizerError: If it does not fit the parameters; nothing is changed then.
            FormatError: If an encoded state in it is broken.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.load_report = loading.load(self, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        extra = {"_backend": self._backend, "_fused": self._fused, "load_report": self.load_report}
        return {**super().__getstate__(), **extra}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; our optimizers have no such option
        self._reset_runtime()
