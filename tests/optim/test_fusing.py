"""Handing groups to a fused backend: what it is given, what is left, what is demanded.

The kernels have tests of their own.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from statecodec import optim
from statecodec.errors import OptimizerError
from statecodec.kernels.curves import Curve
from statecodec.kernels.fused import Hyper, Slot, StateStorage
from statecodec.kernels.triton import runtime
from statecodec.optim import fusing
from tests.optim.helpers import gradients, parameters


class Recorder:
    """A backend that fuses Adam on companded states of bf16 parameters, and writes down what it is given."""

    def __init__(self) -> None:
        self.prepared: list[tuple[str, list[Slot], dict[str, Any]]] = []
        self.calls: list[tuple[list[Any], Hyper]] = []

    def supports(self, method: str, formats: dict[str, Any], param: torch.dtype, low: torch.dtype | None) -> bool:
        return method == "adam" and param == torch.bfloat16 and formats["exp_avg"].curve is not None

    def prepare(self, method: str, slots: list[Slot], formats: dict[str, Any]) -> Any:
        self.prepared.append((method, slots, formats))
        return lambda gradients, hyper: self.calls.append((list(gradients), hyper))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    backend = Recorder()
    monkeypatch.setattr(fusing, "_fused_backend", lambda demanded: backend)
    monkeypatch.setattr(runtime, "INTERPRETED", True)  # as if its kernels reached CPU tensors
    return backend


def test_one_launch_per_group_and_kind(recorder: Recorder) -> None:
    params = parameters(torch.bfloat16)
    names = list(params)
    groups = [
        {"params": [params[n] for n in names[:3]]},
        {"params": [params[n] for n in names[3:]], "lr": 7.0, "betas": (0.5, 0.6)},
    ]
    optimizer = optim.AdamW(groups, lr=1e-2, weight_decay=0.25, dense_below=0, fused=True)
    for k, g in gradients(0).items():
        params[k].grad = g.to(torch.bfloat16)
    for _ in range(3):
        optimizer.step()
    assert [(m, len(s)) for m, s, _ in recorder.prepared] == [("adam", 3), ("adam", 2)]
    assert len(recorder.calls) == 6, "prepared once, called at every step"
    (_, slots, formats), _ = recorder.prepared
    assert formats["exp_avg"] == StateStorage(Curve("softsign", 8, True), 32)
    assert formats["exp_avg_sq"] == StateStorage(Curve("sqrt", 8, False), 32)
    (given, hyper), (_, second), *_ = recorder.calls
    assert all(g is params[n].grad for g, n in zip(given, names[:3], strict=True))
    assert (hyper.lr, hyper.decay, hyper.beta1, hyper.l2) == (1e-2, 0.25, 0.9, 0.0)
    assert (second.lr, second.beta1, second.beta2) == (7.0, 0.5, 0.6)
    assert [s.index for s in slots] == [0, 1, 2]
    slot, p = slots[0], params[names[0]]
    assert slot.param.data_ptr() == p.data_ptr()
    assert slot.step is optimizer.state[p]["step"]
    assert slot.low is optimizer.state[p]["weight_low"].parts["data"]
    assert slot.states["exp_avg"]["codes"] is optimizer.state[p]["exp_avg"].parts["codes"]


def test_prepared_again_when_something_is_replaced(recorder: Recorder) -> None:
    """A parameter's first gradient, its memory, the group's list, a state: what is kept must be what is there."""
    params = [nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = optim.AdamW(params[:2], dense_below=0, fused=True)

    def prepared(gradients: list[int]) -> int:
        before = len(recorder.prepared)
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if i in gradients else None
        optimizer.step()
        return len(recorder.prepared) - before

    assert [prepared([0]), prepared([0]), prepared([0, 1]), prepared([1]), prepared([])] == [1, 0, 1, 0, 0]
    params[0].data = params[0].data.clone()
    assert [prepared([0, 1]), prepared([0, 1])] == [1, 0]
    optimizer.param_groups[0]["params"].append(params[2])
    assert [prepared([0, 1, 2]), prepared([0, 1, 2])] == [1, 0]
    optimizer.state[params[1]] = dict(optimizer.state[params[1]], step=torch.ones(()))
    assert [prepared([0, 1, 2]), prepared([0, 1, 2])] == [1, 0]
    optimizer.state[params[1]]["exp_avg"] = torch.ones(64, 64)
    assert [prepared([0, 1, 2]), prepared([0, 1, 2])] == [1, 0]
    optimizer.state[params[0]].update(step=torch.ones(()))
    assert [prepared([0, 1, 2]), prepared([0, 1, 2])] == [1, 0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert [prepared([0, 1, 2]), prepared([0, 1, 2])] == [1, 0]
    optimizer.state = dict(optimizer.state)  # nobody watches that one
    assert [prepared([0, 1, 2]), prepared([0, 1, 2])] == [0, 0]
    optimizer.state[params[0]] = dict(optimizer.state[params[0]])
    assert [prepared([0, 1, 2]), prepared([0, 1, 2])] == [1, 0]
    optimizer.state[params[0]]["step"] = torch.full_like(optimizer.state[params[0]]["step"], 0)  # an equal one
    assert [prepared([0, 1, 2]), prepared([0, 1, 2])] == [1, 0]
    optimizer.step_param(params[2])
    optimizer.step_param(params[2])
    assert [len(slots) for _, slots, _ in recorder.prepared[-2:]] == [3, 1]


def test_other_optimizers_may_change_their_states(recorder: Recorder) -> None:
    """Then the tensors themselves are looked at, once."""
    p, q = (nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    fused, generic = optim.AdamW([p], dense_below=0, fused=True), optim.AdamW([q], dense_below=0, fused=False)
    for at in range(3):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        fused.step()
        generic.step()
        generic.state[q]["step"] = torch.full((), float(at))
    assert len(recorder.prepared) == 1
    (launches,) = fused._launches.values()
    looked = Mock(wraps=launches._views)
    looked.__iter__ = Mock(side_effect=lambda: iter(views))
    views, launches._views = launches._views, looked
    for _ in range(3):
        fused.step()
    assert looked.__iter__.call_count == 1


def test_a_demand_that_cannot_be_met_is_an_error(recorder: Recorder) -> None:
    p = nn.Parameter(torch.zeros(100, 100))
    p.grad = torch.zeros(100, 100)
    with pytest.raises(OptimizerError, match="no fused adam step"):
        optim.AdamW([p], fused=True).step()
    with pytest.raises(OptimizerError, match="no fused muon step"):
        optim.Muon([p], fused=True).step()
    assert not recorder.calls


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_demand_for_parameters_that_no_kernel_reaches_is_refused_at_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    p = nn.Parameter(torch.zeros(4, device=device))
    with pytest.raises(OptimizerError, match=f"on {device}: move the model to a GPU before"):
        optim.AdamW([p], fused=True)
    optimizer = optim.AdamW([nn.Parameter(torch.zeros(4))])
    optimizer._fused = True
    with pytest.raises(OptimizerError, match=f"on {device}"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("fused", [None, False])
def test_cpu_parameters_are_not_fused_unless_demanded(recorder: Recorder, fused: bool | None) -> None:
    p = nn.Parameter(torch.zeros(100, 100, dtype=torch.bfloat16))
    p.grad = torch.ones(100, 100, dtype=torch.bfloat16)
    optim.AdamW([p], fused=fused).step()
    assert not recorder.calls
    assert bool(p.any())


def test_l2_and_extra_options_reach_the_kernel(recorder: Recorder) -> None:
    p = nn.Parameter(torch.zeros(100, 100, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optim.Adam([p], lr=1e-2, weight_decay=0.3, maximize=True, stochastic_rounding=True, seed=9, fused=True).step()
    (_, hyper), *_ = recorder.calls
    assert (hyper.l2, hyper.decay, hyper.maximize, hyper.stochastic, hyper.seed) == (0.3, 0.0, True, True, 9)
