"""Gradient release: the bits of step() and zero_grad(), with no gradient left behind."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

from statecodec import optim
from statecodec.errors import OptimizerError
from tests.optim.helpers import EVERY, bits


class Tied(nn.Module):
    """The embedding is the output head as well, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.hidden = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.frozen(torch.tanh(self.hidden(self.embed(tokens)))))
        return logits


def model() -> Tied:
    torch.manual_seed(0)
    return Tied().to(torch.bfloat16)


def loss(net: Tied, step: int) -> Tensor:
    tokens = torch.randint(0, 30, (8, 12), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(net(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.filterwarnings("ignore:SlimAdam rules that match no parameter")
@pytest.mark.parametrize("name", EVERY)
def test_it_equals_the_manual_step(name: str) -> None:
    manual, released = model(), model()
    a, b = EVERY[name](manual.named_parameters()), EVERY[name](released.named_parameters())
    with optim.enable_gradient_release(released, b) as release:
        assert release.active
        for step in range(4):
            loss(manual, step).backward()
            a.step()
            a.zero_grad()
            loss(released, step).backward()
            assert all(p.grad is None for p in released.parameters())
            b.step()
            b.zero_grad()
    assert bits(dict(manual.named_parameters())) == bits(dict(released.named_parameters()))
    assert bits(a.state_dict()) == bits(b.state_dict())
    assert int(b.state[released.embed.weight]["step"]) == 4  # once per backward pass, although used twice


def test_removing_restores_ordinary_steps() -> None:
    net = model()
    optimizer = optim.AdamW(net.parameters())
    handle = optim.enable_gradient_release(net, optimizer)
    handle.remove()
    handle.remove()
    assert not handle.active
    loss(net, 0).backward()
    assert net.hidden.weight.grad is not None
    assert not optimizer.state
    optimizer.step()
    assert int(optimizer.state[net.hidden.weight]["step"]) == 1


def test_parameters_of_another_optimizer_keep_their_gradients() -> None:
    net = model()
    optimizer = optim.AdamW(net.hidden.parameters())
    with optim.enable_gradient_release(net, optimizer):
        loss(net, 0).backward()
    assert net.hidden.weight.grad is None
    assert net.embed.weight.grad is not None


def test_hooks_do_not_keep_the_optimizer_alive() -> None:
    net = model()
    optimizer = optim.AdamW(net.parameters())
    optim.enable_gradient_release(net, optimizer)
    del optimizer
    gc.collect()
    loss(net, 0).backward()
    assert net.hidden.weight.grad is not None


def test_what_cannot_be_released_is_refused() -> None:
    net = model()
    with pytest.raises(OptimizerError, match="none of the model"):
        optim.enable_gradient_release(nn.Linear(2, 2), optim.AdamW(net.parameters()))

    class DistributedDataParallel(nn.Module):
        pass

    with pytest.raises(OptimizerError, match="reduced the gradients"):
        optim.enable_gradient_release(DistributedDataParallel(), optim.AdamW(net.parameters()))


def test_a_copy_of_a_released_model_is_not_released() -> None:
    net = model()
    optimizer = optim.AdamW(net.parameters())
    with optim.enable_gradient_release(net, optimizer):
        twin = copy.deepcopy(net)
        loss(twin, 0).backward()
    assert twin.hidden.weight.grad is not None
    assert not optimizer.state
