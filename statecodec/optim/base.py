"""The optimizer that every class here is: torch's interface over states kept in encoded form.

`state[p]` holds `step` and `skipped` (0-d fp32 tensors), `weight_low` (the low part of the master weight, where there
is one) and the method's states, each an EncodedTensor: a plain value that torch's cast-on-load and its iteration over
tensors leave alone.

A gradient that is not finite, or whose squares may sum beyond fp32 (|g| > 2**48), skips its own tensor's step and is
counted in `skipped`: every method here would otherwise spread it over a group, a block, a row or the whole matrix.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypedDict, cast

import torch
from torch import Tensor

from statecodec import kernels
from statecodec.codecs import EncodedTensor, Raw
from statecodec.errors import OptimizerError
from statecodec.kernels.fused import LARGEST_GRADIENT
from statecodec.kernels.reference import steps as reference_steps
from statecodec.optim import fusing, interop
from statecodec.optim.method import Group, Job, Method, Plan
from statecodec.optim.options import check_number, check_param, plain_moments
from statecodec.optim.tiles import Scratch
from statecodec.optim.weights import MASTER_WEIGHTS, Dither, Weight, split_codec, whole


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


class StateOptimizer(torch.optim.Optimizer):
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
        fused: True demands fused steps, False forbids them, None uses them on GPUs where there is one.

    All options but `backend` and `fused` may be set per param group.
    """

    algorithm: ClassVar[str]
    # Options of the torch.optim class whose state `state_dict(dense=True)` gives, with their defaults.
    torch_options: ClassVar[dict[str, Any]] = {}
    load_report: interop.LoadReport

    def __init__(self, params: Any, defaults: Mapping[str, Any], options: Options) -> None:
        given = {**COMMON, **options}
        if given.keys() != COMMON.keys():
            raise OptimizerError(f"no option {sorted(given.keys() - COMMON)}; the common ones are {', '.join(COMMON)}")
        self._backend, self._fused = cast(str | None, given.pop("backend")), cast(bool | None, given.pop("fused"))
        if self._backend is not None:
            kernels.get(self._backend)
        self.load_report = interop.LoadReport()
        self._reset_runtime()
        super().__init__(params, {**defaults, **given, "algorithm": self.algorithm})

    @abstractmethod
    def method(self, param: Tensor, name: str | None, group: Group) -> Method:
        """The update rule for one parameter."""

    def check_group(self, group: Group) -> None:
        """Raise OptimizerError for options that this class cannot take. Extended by subclasses."""
        check_number("lr", group["lr"], 0)
        check_number("weight_decay", group["weight_decay"], 0)
        if group["master_weights"] not in MASTER_WEIGHTS:
            raise OptimizerError(f"master_weights={group['master_weights']!r}, expected one of {MASTER_WEIGHTS}")
        group["moments"] = plain_moments(group["moments"])
        if group["decouple_lr"]:
            group.setdefault("initial_lr", float(group["lr"]))
            check_number("initial_lr (decouple_lr divides by it)", group["initial_lr"], 1e-45)
        for p in group["params"]:
            check_param(p)
            if group["stochastic_rounding"] and p.dtype == torch.float16:
                raise OptimizerError("stochastic_rounding is for bf16 parameters; fp16's grid is uneven, use split32")

    def takes_torch_group(self, group: Mapping[str, Any]) -> bool:
        """Whether the options of a torch.optim group mean the same here."""
        return False

    # --- stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step; `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None]
            rest = fusing.step_group(self, group, ready) if self._fused is not False else ready
            for p in rest:
                self._step_one(p, group)
        return loss

    @torch.no_grad()
    def step_param(self, param: Tensor) -> None:
        """Step one parameter from its `.grad`; gradient release calls it during the backward pass."""
        group = self._group_of(param)
        for p in fusing.step_group(self, group, [param]) if self._fused is not False else [param]:
            self._step_one(p, group)

    def _step_one(self, p: Tensor, group: Group) -> None:
        grad = cast(Tensor, p.grad)
        if grad.is_sparse:
            raise OptimizerError("sparse gradients are not supported; build the embedding with sparse=False")
        plan, state = self.plan(p, group), self.ensure_state(p, group)
        if not _usable(grad):
            state["skipped"] += 1
            return
        state["step"] += 1
        t = int(state["step"])
        work = p.detach().contiguous()
        job = Job(
            plan=plan, weight=self._weight(p, work, plan, group, t), grad=grad.detach().contiguous(),
            states={k: state[k] for k in plan.specs}, group=group, t=t, scratch=self._scratch,
            backend=kernels.resolve(self._backend, p.device), steps=self._arithmetic(work),
        )  # fmt: skip
        plan.method.step(job)
        if work.data_ptr() != p.data_ptr():
            p.copy_(work)

    def _weight(self, p: Tensor, work: Tensor, plan: Plan, group: Group, t: int) -> Weight:
        low = self.state[p].get("weight_low")
        dither = Dither(group["seed"], plan.index, t) if group["stochastic_rounding"] else None
        return Weight(
            work, None if low is None else low.parts["data"], split_codec(p.dtype, group["master_weights"]), dither,
            self._scratch, kernels.resolve(self._backend, p.device), self._arithmetic(work),
        )  # fmt: skip

    def _arithmetic(self, p: Tensor) -> Any:
        if p.device.type == "cpu" and self._backend in (None, "cpu"):
            from statecodec.kernels.cpu import steps as cpu_steps

            return cpu_steps
        return reference_steps

    # --- plans and states

    def plan(self, p: Tensor, group: Group) -> Plan:
        """Method, codecs and tiles of one parameter; made once, before its first step."""
        if p not in self._plans:
            index, name = self._places[p]
            method = self.method(p, name, group)
            self._plans[p] = Plan(name, index, method, method.specs(p, group), method.view_shape(p))
        return self._plans[p]

    def ensure_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        """The state of one parameter, created on its first step."""
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            plan = self.plan(p, group)
            state.update(self.fresh_state(p, group), **plan.method.init(p, plan, group))
        return state

    def fresh_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        """Counters and the low part of the master weight, all zero."""
        state: dict[str, Any] = {"step": torch.zeros((), device=p.device), "skipped": torch.zeros((), device=p.device)}
        split = split_codec(p.dtype, group["master_weights"])
        if split is not None:
            low = split.parts(tuple(p.shape), torch.float32)["low"].dtype
            state["weight_low"] = Raw().zeros(tuple(p.shape), low, p.device)
        return state

    def skipped(self) -> dict[str | int, int]:
        """Steps skipped for gradients that were not finite, by parameter name (or position); only those that skipped
        any."""
        found = {
            self._places[p][1] or self._places[p][0]: int(s["skipped"]) for p, s in self.state.items() if "skipped" in s
        }
        return {k: n for k, n in found.items() if n}

    def state_nbytes(self) -> int:
        """Bytes of everything this optimizer keeps: encoded states, low parts, counters."""
        total = 0
        for state in self.state.values():
            for value in state.values():
                total += value.nbytes if isinstance(value, EncodedTensor | Tensor) else 0
        return total

    # --- full-precision weights

    @torch.no_grad()
    def master_weight(self, p: Tensor) -> Tensor:
        """A copy of the weight as the optimizer sees it: fp32 (fp64 for fp64 parameters), the parameter's shape."""
        group = self._group_of(p)
        plan, work = self.plan(p, group), p.detach().contiguous()
        weight = self._weight(p, work, plan, group, 0)
        return weight.load(whole(work)).clone().view(p.shape)

    @torch.no_grad()
    def set_master_weight(self, p: Tensor, value: Tensor) -> None:
        """Set parameter and low part from a full-precision weight (rounded to nearest): an fp32 checkpoint loses
        nothing that the split can hold. Raises OptimizerError for another shape."""
        if value.shape != p.shape:
            raise OptimizerError(f"a master weight of shape {tuple(value.shape)} for a parameter of {tuple(p.shape)}")
        group = self._group_of(p)
        self.ensure_state(p, group)
        plan, work = self.plan(p, group), p.detach().contiguous()
        if work.dtype in (torch.float32, torch.float64):
            work.copy_(value)
        else:
            weight = self._weight(p, work, plan, {**group, "stochastic_rounding": False}, 0)
            weight.store(whole(work), value.detach().to(device=p.device, dtype=torch.float32).contiguous())
        if work.data_ptr() != p.data_ptr():
            p.copy_(work)

    # --- torch's interface

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises OptimizerError for parameters or options that cannot be taken."""
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except OptimizerError:
            self.param_groups.pop()
            raise
        self._reset_runtime()

    def state_dict(self, dense: bool = False) -> dict[str, Any]:
        """The state as plain values: every encoded state in the form of `codecs.plain`, sharing memory with the live
        one.

        `dense=True`: decoded to fp32 under torch.optim's names, with torch.optim's group options, for the torch class
        of the same name (FOAM, SlimAdam and LoRAPre: AdamW). Master weights are not part of it; see `master_weight`.
        """
        state, groups = self.state, self.param_groups
        self.state = interop.dense_states(self) if dense else interop.plain_states(self)
        self.param_groups = [interop.torch_group(self, g) for g in groups] if dense else groups
        try:
            return super().state_dict()
        finally:
            self.state, self.param_groups = state, groups

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
        self.load_report = interop.load(self, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_backend": self._backend, "_fused": self._fused, "load_report": self.load_report}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_runtime()

    def _reset_runtime(self) -> None:
        self._plans: dict[Tensor, Plan] = {}
        self._scratch = Scratch()
        params: Iterable[tuple[Tensor, str | None]] = [
            pair for g in getattr(self, "param_groups", [])
            for pair in zip(g["params"], g.get("param_names", [None] * len(g["params"])), strict=True)
        ]  # fmt: skip
        self._places = {p: (i, _clean(name)) for i, (p, name) in enumerate(params)}
        self._groups = {p: g for g in getattr(self, "param_groups", []) for p in g["params"]}

    def _group_of(self, param: Tensor) -> Group:
        if param not in self._groups:
            raise OptimizerError("this parameter belongs to none of the optimizer's groups")
        return cast(Group, self._groups[param])


def _clean(name: str | None) -> str | None:
    """A parameter's name without what torch.compile and DDP put in front."""
    return None if name is None else name.replace("_orig_mod.", "").removeprefix("module.")


def _usable(grad: Tensor) -> bool:
    """Whether a gradient may be used: one pass, no temporaries; NaN fails both comparisons."""
    if not grad.numel():
        return True
    low, high = torch.aminmax(grad)
    return bool(low >= -LARGEST_GRADIENT) and bool(high <= LARGEST_GRADIENT)
