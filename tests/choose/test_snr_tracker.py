"""The live tracker: the paper's schedule, the same numbers as measuring the states by hand, rules, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from statecodec import SNRTracker
from statecodec.choose.snr import average, snr
from statecodec.choose.snr_tracker import paper_schedule
from statecodec.errors import UsageError
from statecodec.optim import FOAM, AdamW, SlimAdam


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def test_paper_schedule() -> None:
    measured = [s for s in range(4001) if paper_schedule(s)]
    assert measured == [1, *range(100, 1000, 100), 1000, 2000, 3000, 4000]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW])
def test_tracks_what_the_states_hold(kind: type[torch.optim.Optimizer]) -> None:
    net = model()
    optimizer = kind(net.parameters(), lr=1e-3)
    tracker = SNRTracker(optimizer, net.named_parameters(), schedule=lambda s: s in (2, 5))
    by_hand = []
    for i in range(1, 7):
        step(net, optimizer, i)
        assert tracker.step() == (i in (2, 5))
        if i in (2, 5):
            moment = optimizer.state[net[0].weight]["exp_avg_sq"]
            by_hand.append(snr(moment if isinstance(moment, torch.Tensor) else moment.decode()))
    assert tracker.steps == (2, 5)
    layers = {layer.name: layer for layer in tracker.layers()}
    for dims, ratio in average(by_hand).items():
        assert layers["0.weight"].ratios[dims] == pytest.approx(ratio, rel=1e-12)
    assert not layers["0.bias"].shareable
    assert not layers["2.weight"].shareable
    assert layers["3.weight"].shareable


def test_rules_feed_slimadam(tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    tracker = SNRTracker(optimizer, net.named_parameters())
    step(net, optimizer, 0)
    assert tracker.step()
    tracker.save_rules(tmp_path / "rules.json", cutoff=0.0)
    slim = SlimAdam(net.named_parameters(), rules=str(tmp_path / "rules.json"))
    step(net, slim, 1)
    assert slim.state[net[0].weight]["exp_avg_sq"].codec.name == "shared"


def test_state_goes_into_a_checkpoint(tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    first = SNRTracker(optimizer, net.named_parameters(), schedule=lambda s: s <= 2)
    step(net, optimizer, 0)
    first.step()
    torch.save(first.state_dict(), tmp_path / "tracker.pt")
    second = SNRTracker(optimizer, net.named_parameters(), schedule=lambda s: s <= 2)
    second.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
    step(net, optimizer, 1)
    first.step()
    second.step()
    assert first.layers() == second.layers()
    assert second.steps == (1, 2)
    with pytest.raises(UsageError, match="lacks"):
        SNRTracker(optimizer, []).load_state_dict(first.state_dict())


def test_refuses_states_with_nothing_left_to_measure() -> None:
    net = model()
    optimizer = FOAM(net.named_parameters(), lr=1e-3, level=1)
    tracker = SNRTracker(optimizer, net.named_parameters())
    with pytest.raises(UsageError, match="has been measured"):
        tracker.layers()
    step(net, optimizer, 0)
    with pytest.raises(UsageError, match="folded"):
        tracker.step()
