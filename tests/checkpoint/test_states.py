"""A checkpoint of a live optimizer shows its states by role and codec, as it is and compressed; hostile ones do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec.checkpoint.states import encoded_state
from statecodec.codecs import format_codec
from statecodec.codecs.plain import from_plain, is_plain
from statecodec.dtypes import INT8, name_of
from statecodec.errors import UsageError
from statecodec.optim import FOAM, AdamW, Lion, LoRAPre, SlimAdam, StateOptimizer
from statecodec.roles import STATE_ROLES

RULES = [("*.weight", [0])]
KINDS: dict[str, Callable[[Any], StateOptimizer]] = {
    "adamw": lambda params: AdamW(params, lr=1e-3, moments="companded8"),
    "foam": lambda params: FOAM(params, lr=1e-3),
    "slimadam": lambda params: SlimAdam(params, lr=1e-3, rules=RULES),
    "lorapre": lambda params: LoRAPre(params, lr=1e-3, rank=4),
    "lion": lambda params: Lion(params, lr=1e-4, moments="companded8"),
}


def saved(path: Path, kind: str) -> dict[int, dict[str, Any]]:
    """A checkpoint after one step; returns the states in it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 80), torch.nn.GELU(), torch.nn.Linear(80, 96))
    optimizer = KINDS[kind](list(model.named_parameters()))
    model(torch.randn(4, 96)).square().mean().backward()
    optimizer.step()
    found = optimizer.state_dict()
    torch.save({"model": model.state_dict(), "optimizer": found}, path)
    states: dict[int, dict[str, Any]] = found["state"]
    return states


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_is_named_with_its_role_and_codec(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    states = saved(path, kind)
    expected, sizes = {}, {}
    for index, own in states.items():
        for key, value in own.items():
            if is_plain(value):
                name = f"optimizer.state.{index}.{key}"
                state, role = from_plain(value), STATE_ROLES.get(key, "other")
                expected[name] = (role, format_codec(state.codec), state.shape, name_of(state.dtype))
                sizes[name] = state.nbytes
    assert expected
    compressed = statecodec.compress(path)
    for report in (statecodec.inspect(path), compressed, statecodec.inspect(tmp_path / "ckpt.sc.safetensors")):
        held = [t for t in report.tensors if t.state is not None]
        found = {t.state.name: t.state for t in held if t.state is not None}
        assert {name: (s.role, s.codec, s.shape, s.dtype) for name, s in found.items()} == expected
        assert all(t.codec == "raw" for t in held), "the parts themselves are kept bit for bit"
        for name, size in sizes.items():
            assert sum(t.bytes_before for t in held if t.state == found[name]) == size
        assert report.num_params == 2 * 96 * 80 + 96 + 80
    note = "encoded states of a live optimizer are kept as they are"
    assert any(note in line for line in (*compressed.unmet, *compressed.notes))
    assert statecodec.verify(tmp_path / "ckpt.sc.safetensors", against=path).tensors
    with pytest.raises(UsageError, match=r"encoded by a live optimizer|no second moments"):
        statecodec.analyze(path)


def test_the_optimizer_alone_counts_its_parameters(tmp_path: Path) -> None:
    states = saved(tmp_path / "all.pt", "adamw")
    torch.save({"state": states, "param_groups": [{"params": list(states)}]}, tmp_path / "optimizer.pt")
    report = statecodec.inspect(tmp_path / "optimizer.pt")
    assert report.num_params == sum(math.prod(from_plain(s["exp_avg"]).shape) for s in states.values())
    assert {t.state.name for t in report.tensors if t.state is not None} >= {"state.0.exp_avg", "state.0.exp_avg_sq"}


GOOD = {"part": "codes", "role": "exp_avg", "codec": {"name": "companded"}, "shape": [3, 64], "dtype": "float32"}


@pytest.mark.parametrize(
    "change",
    [
        {"part": "scales"}, {"part": 3}, {"role": None}, {"codec": {"name": "nothing"}}, {"codec": []}, {"codec": {}},
        {"codec": {"name": "companded", "bits": 1 << 70}}, {"codec": "nothing(version=1)"}, {"codec": "companded("},
        {"shape": [3, 65]}, {"shape": [-3]}, {"shape": [True, 64]},
        {"shape": [1] * 1000}, {"dtype": "int32"}, {"dtype": ["float32"]}, {"dtype": "complex32"},
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_no_state(change: dict[str, Any]) -> None:
    for codec in ({"name": "companded"}, "companded(version=2)"):
        assert encoded_state(GOOD | {"codec": codec}, "state.0.exp_avg.parts.codes", (3, 64), INT8) is not None
    assert encoded_state(GOOD | change, "x", (3, 64), INT8) is None
    assert encoded_state(None, "x", (3, 64), INT8) is None


def test_hostile_states_in_a_torch_file_are_ordinary_tensors(tmp_path: Path) -> None:
    deep: Any = {"name": "companded"}
    for _ in range(200):
        deep = {"name": "folded", "inner": deep}
    wide = {"name": "companded", "x": list(range(10_000))}
    codes = torch.zeros(3, 64, dtype=torch.int8)
    state = {
        i: {"exp_avg": {"codec": codec, "shape": [3, 64], "dtype": "float32", "parts": {"codes": codes, 5: codes}}}
        for i, codec in enumerate([deep, wide, {}, {"name": torch.zeros(3)}, {1: 2}])
    }
    keys = ("float32[3,64] " + "folded(inner=" * 200, "float32[" + "3," * 5000 + "64] raw(version=1)", "x[] y()")
    state |= {9 + i: {"exp_avg": {key: {"codes": codes, 5: codes}}} for i, key in enumerate(keys)}
    torch.save({"state": state, "param_groups": [{"params": list(state)}]}, tmp_path / "x.pt")
    report = statecodec.inspect(tmp_path / "x.pt")
    assert all(t.state is None for t in report.tensors)
    statecodec.compress(tmp_path / "x.pt")
