"""Handing groups to a fused backend: what it is given, what is left, what is demanded. The kernels have tests of
their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from statecodec import optim
from statecodec.errors import OptimizerError
from statecodec.kernels.fused import Hyper, Slot
from statecodec.kernels.triton import runtime
from statecodec.optim import fusing
from tests.optim.helpers import gradients, parameters


class Recorder:
    """A backend that fuses Adam on companded states of bf16 parameters, and writes down its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Slot], dict[str, Any], Hyper]] = []

    def supports(self, method: str, formats: dict[str, Any], param: torch.dtype, low: torch.dtype | None) -> bool:
        return method == "adam" and param == torch.bfloat16 and formats["exp_avg"]["name"] == "companded"

    def step(self, method: str, slots: list[Slot], formats: dict[str, Any], hyper: Hyper) -> None:
        self.calls.append((method, slots, formats, hyper))


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
    optimizer.step()
    assert [(m, len(s)) for m, s, *_ in recorder.calls] == [("adam", 3), ("adam", 2)]
    (_, slots, formats, hyper), (*_, second) = recorder.calls
    assert formats["exp_avg"]["curve"] == "softsign"
    assert formats["exp_avg_sq"]["curve"] == "sqrt"
    assert (hyper.lr, hyper.decay, hyper.beta1, hyper.l2) == (1e-2, 0.25, 0.9, 0.0)
    assert (second.lr, second.beta1, second.beta2) == (7.0, 0.5, 0.6)
    assert [s.index for s in slots] == [0, 1, 2]
    slot, p = slots[0], params[names[0]]
    assert slot.param.data_ptr() == p.data_ptr()
    assert slot.step is optimizer.state[p]["step"]
    assert slot.low is optimizer.state[p]["weight_low"].parts["data"]
    assert slot.states["exp_avg"]["codes"] is optimizer.state[p]["exp_avg"].parts["codes"]


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
    hyper = recorder.calls[0][3]
    assert (hyper.l2, hyper.decay, hyper.maximize, hyper.stochastic, hyper.seed) == (0.3, 0.0, True, True, 9)
