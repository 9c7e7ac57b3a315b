"""Casting a model: which tensors stay fp32, that it still computes, and that nothing gets lost."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from statecodec import optim
from statecodec.errors import OptimizerError

BF16, FP32 = torch.bfloat16, torch.float32


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.bn, self.ln = nn.BatchNorm1d(8), nn.LayerNorm(8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 16), "proj": nn.Linear(16, 8)})
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.arange(4))
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.bn(self.conv(h.mT)).mT
        h = h + self.block["proj"](torch.relu(self.block["fc"](self.ln(h)))) * self.table
        result: Tensor = self.head(h)
        return result


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())}


def tokens() -> Tensor:
    return torch.arange(15).view(3, 5)


def check(model: nn.Module, kept: list[str], output: torch.dtype) -> None:
    """These tensors are fp32, all other floats bf16; the model runs, and every parameter gets a gradient like it."""
    for name, dtype in dtypes(model).items():
        if dtype.is_floating_point:
            assert dtype == (FP32 if any(name.startswith(k) for k in kept) else BF16), name
    found = model(tokens())
    assert found.dtype == output
    assert bool(found.isfinite().all())
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "kept", "output"),
    [
        ({}, ["bn."], BF16),
        ({"selective": False}, [], BF16),
        ({"full_precision_layers": ["head"]}, ["bn.", "head."], FP32),
        ({"full_precision_layers": ["*ead"], "selective": False}, ["head."], FP32),
        ({"full_precision_recast_layers": ["ln", "block.*"]}, ["bn.", "ln.", "block."], BF16),
        ({"full_precision_recast_layers": ["head"]}, ["bn.", "head."], BF16),
        ({"full_precision_recast_layers": ["block"], "full_precision_layers": ["head"]}, ["bn.", "block.", "head."],
         FP32),
    ],
)  # fmt: skip
def test_what_is_kept_and_that_it_computes(options: dict[str, Any], kept: list[str], output: torch.dtype) -> None:
    exact = Net()(tokens())
    model = Net()
    names = optim.cast_model(model, **options)
    assert [n for n, d in dtypes(model).items() if d == FP32] == sorted(names, key=list(dtypes(model)).index)
    check(model, kept, output)
    assert dtypes(model)["counts"] == torch.int64
    assert torch.allclose(model(tokens()).float(), exact, atol=0.05)


def test_modules_may_be_named_by_themselves() -> None:
    model = Net()
    optim.cast_model(model, full_precision_layers=[model.head], full_precision_recast_layers=[model.block])
    check(model, ["bn.", "block.", "head."], FP32)


@pytest.mark.parametrize("which", [{"full_precision_layers": ["head"]}, {"full_precision_recast_layers": ["embed"]}])
def test_a_tied_weight_is_fp32_for_both_of_its_layers(which: dict[str, Any]) -> None:
    model = Net(tied=True)
    optim.cast_model(model, **which)
    assert model.head.weight is model.embed.weight
    check(model, ["bn.", "head.", "embed."], FP32 if "full_precision_layers" in which else BF16)
    assert model.embed(tokens()).dtype == BF16


def test_parameters_stay_the_objects_they_are() -> None:
    model = Net()
    model.twin = nn.Linear(8, 20, bias=False)
    model.twin.weight.data = model.head.weight.data  # two parameters, one memory
    model(tokens()).sum().backward()
    before = dict(model.named_parameters())
    optim.cast_model(model)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert model.twin.weight.data_ptr() == model.head.weight.data_ptr()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    model(tokens()).sum().backward()


def test_kept_layers_of_a_half_precision_model_become_fp32() -> None:
    model = Net().to(torch.float16)
    optim.cast_model(model, full_precision_layers=["head"])
    check(model, ["bn.", "head."], FP32)


@pytest.mark.parametrize("layers", [["lm_head"], ["head", "nothing*"], [nn.Linear(2, 2)]])
def test_a_layer_that_is_not_there_is_refused_and_nothing_cast(layers: list[Any]) -> None:
    model = Net()
    before = dtypes(model)
    with pytest.raises(OptimizerError, match="no layer of the model is"):
        optim.cast_model(model, full_precision_layers=layers)
    assert dtypes(model) == before
    with pytest.raises(OptimizerError, match="bf16 or fp16"):
        optim.cast_model(model, torch.float64)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_cast_model_is_copied_with_its_casts(twin_of: Any) -> None:
    model = Net()
    optim.cast_model(model, full_precision_layers=["head"])
    twin = twin_of(model)
    assert torch.equal(twin(tokens()), model(tokens()))


def test_compiled_and_parametrised_models() -> None:
    model = Net()
    parametrizations.weight_norm(model.head)
    compiled: Any = torch.compile(model, backend="aot_eager")
    optim.cast_model(compiled, full_precision_layers=["head"])
    assert compiled(tokens()).dtype == FP32
    assert torch.allclose(compiled(tokens()), model(tokens()), atol=1e-2)


def test_inputs_by_keyword_and_nested_outputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, *, x: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return self.fc(x["a"]), {"mask": x["mask"], "b": self.fc(x["a"])}

    model = nn.ModuleDict({"pair": Pair()})
    optim.cast_model(model, full_precision_recast_layers=["pair"])
    first, rest = model["pair"](x={"a": torch.ones(2, 4, dtype=BF16), "mask": torch.ones(2, dtype=torch.bool)})
    assert (first.dtype, rest["b"].dtype, rest["mask"].dtype) == (BF16, BF16, torch.bool)


def test_training_after_a_cast_keeps_the_exact_weights() -> None:
    """The recipe of the docstring: nothing that the split can hold is lost, and fp32 layers have no low part."""
    model = Net()
    exact = {k: v.float().clone() if v.is_floating_point() else v.clone() for k, v in model.state_dict().items()}
    optim.cast_model(model, full_precision_layers=["head"])
    optimizer = optim.AdamW(model.named_parameters(), lr=1e-2, master_weights="split32")
    optim.load_fp32_state_dict(model, optimizer, exact)
    masters = optim.fp32_state_dict(model, optimizer)
    assert all(torch.equal(masters[name], exact[name]) for name, _ in model.named_parameters())
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens()).view(-1, 20), tokens().view(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert "weight_low" not in optimizer.state[model.head.weight]
    assert "weight_low" in optimizer.state[model.conv.weight]
