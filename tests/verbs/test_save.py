"""`save` and `load` are inverse for what save takes; what it does not take is named by its key path."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import statecodec
from statecodec.errors import OutputExists, UsageError

Pair = namedtuple("Pair", "a b")


class Sub(Tensor):
    """A subclass that does nothing."""


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def freed() -> Tensor:
    tensor = torch.ones(10)
    tensor.untyped_storage().resize_(0)
    return tensor


REFUSED: dict[str, tuple[Any, str]] = {
    "meta": (torch.ones(3, device="meta"), "device meta"),
    "jagged": (jagged(), "nested|subclass|plain tensors"),
    "sparse": (torch.ones(3).to_sparse(), "layout torch.sparse_coo"),
    "subclass": (torch.ones(3).as_subclass(Sub), "test_save.Sub"),
    "uninitialised": (nn.UninitializedParameter(), "UninitializedParameter"),
    "conjugated": (torch.ones(3, dtype=torch.complex64).conj(), "conjugated"),
    "freed": (freed(), "freed"),
    "named tuple": (Pair(1, 2), r"Pair: .*; tuple\(...\) of it can be saved"),
    "defaultdict": (defaultdict(int, a=1), r"defaultdict: .*; dict\(...\) of it"),
    "Counter": (Counter("aab"), r"Counter: .*; dict\(...\) of it"),
    "numpy number": (np.float64(1.5), r"numpy.float64: .*; float\(...\) of it"),
    "array": (np.ones(3), "numpy.ndarray"),
    "set": ({1}, "builtins.set"),
    "range": (range(3), "builtins.range"),
    "object": (object(), "builtins.object"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_come_back_is_refused_by_its_key_path(tmp_path: Path, kind: str) -> None:
    value, match = REFUSED[kind]
    with pytest.raises(UsageError, match=rf"^model\.layers\.1 is .*({match})"):
        statecodec.save({"model": {"layers": [1, value]}}, tmp_path / "x.sc.safetensors")
    with pytest.raises(UsageError, match=r"^the value is "):
        statecodec.save(value, tmp_path / "x.sc.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    quantized = torch._empty_affine_quantized([3], scale=0.5, zero_point=1, dtype=torch.qint8)
    with pytest.raises(UsageError, match="quantized"):
        statecodec.save({"q": quantized}, tmp_path / "x.sc.safetensors")


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if isinstance(a, Tensor):
        alike = type(b) is Tensor and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        return alike and torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or repr(a) == repr(b)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_what_is_taken_comes_back(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    value = {
        "model": OrderedDict(w=torch.randn(3, 4), b=torch.ones(2).bfloat16()), 0: [1, -1, 1 << 70, True, None],
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(3.0)}}},
        (1, "a"): (1.5, float("inf"), float("nan"), -0.0, 2j), "bytes": b"\0\xff", "text": "\ud800 \u00e9",
        "dtype": torch.bfloat16, "size": torch.Size([1, 2]), "device": torch.device("cpu"), "empty": torch.empty(0, 5),
        "views": [base[::2], base.view(3, 4).t(), base[3:5]], "expanded": torch.tensor([1.5]).expand(1 << 20, 1 << 20),
        "half complex": torch.ones(3, dtype=torch.complex32),
        "e8m0": torch.ones(4, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }  # fmt: skip
    expanded = value.pop("expanded")
    report = statecodec.save({**value, "expanded": expanded}, tmp_path / "x.sc.safetensors")
    assert report.bytes < 10_000
    loaded = statecodec.load(tmp_path / "x.sc.safetensors")
    again = loaded.pop("expanded")
    assert (again.shape, again.stride(), float(again[5, 5])) == (expanded.shape, expanded.stride(), 1.5)
    assert same(loaded, value)
    views = loaded["views"]
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1, "they share memory again"
    with pytest.raises(OutputExists):
        statecodec.save(value, tmp_path / "x.sc.safetensors")


def test_parameters_come_back_as_tensors(tmp_path: Path) -> None:
    module = nn.Linear(3, 4)
    statecodec.save(dict(module.named_parameters()), tmp_path / "x.sc.safetensors")
    loaded = statecodec.load(tmp_path / "x.sc.safetensors")
    assert torch.equal(loaded["weight"], module.weight)


def test_too_deep(tmp_path: Path) -> None:
    value: Any = 1
    for _ in range(200):
        value = [value]
    with pytest.raises(UsageError, match="nested more than 100 deep"):
        statecodec.save(value, tmp_path / "x.sc.safetensors")
