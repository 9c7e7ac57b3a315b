"""Broken states and options: one of our errors, with nothing changed, or something that trains; never anything else."""

from __future__ import annotations

import copy
import random
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from statecodec.errors import OptimizerError, StatecodecError
from tests.optim.helpers import EVERY, bits, parameters, run

JUNK: list[Any] = [
    None, True, -1, 2**70, 1.5, float("nan"), "x", "\ud800", b"y", [], [1], {}, {"a": 1}, (), torch.zeros(0),
    torch.zeros(3), torch.tensor(float("nan")), torch.zeros(24, 70, dtype=torch.complex64),
    torch.zeros(24, 70, dtype=torch.int32), torch.zeros(70, 24), torch.zeros(24, 70, device="meta"),
    torch.zeros(24, 70).to_sparse(), np.float32(2), np.zeros(3), np.str_("x"), object(), len, set(), range(3),
    torch.float32, (i for i in ()),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], junk: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = junk


@pytest.mark.filterwarnings("ignore:.*complex values to real:UserWarning")
@pytest.mark.parametrize("name", EVERY)
def test_junk_anywhere_in_a_state(name: str) -> None:
    draw = random.Random(zlib.crc32(name.encode()))
    optimizer = EVERY[name](parameters(torch.bfloat16).items())
    run(optimizer, dict(zip(parameters(), optimizer.parameters(), strict=True)), range(1))
    state = optimizer.state_dict()
    everywhere = list(places(state))
    other_keys = [path for path in everywhere if path[0] == "param_groups"]
    params = parameters(torch.bfloat16)
    target = EVERY[name](params.items())
    for _ in range(80):
        path, junk = draw.choice(draw.choice([everywhere, other_keys])), draw.choice(JUNK)
        broken = copy.deepcopy(state)
        put(broken, path, junk)
        before = bits(target.state_dict())
        try:
            target.load_state_dict(broken)
        except StatecodecError:
            assert bits(target.state_dict()) == before, (path, junk)
            continue
        except Exception as error:
            raise AssertionError(f"{path} = {junk!r}") from error
        try:
            run(target, params, range(1))
            target.state_dict()
        except Exception as error:
            raise AssertionError(f"stepping after {path} = {junk!r}") from error
        target = EVERY[name](params.items())


@pytest.mark.parametrize("name", EVERY)
def test_junk_in_any_option(name: str) -> None:
    options = EVERY[name](parameters().items()).defaults.keys() - {"algorithm"}
    for option in sorted(options):
        for junk in JUNK:
            params = parameters()
            try:
                optimizer = EVERY[name]([{"params": list(params.items()), option: junk}])
            except StatecodecError:
                continue
            except Exception as error:
                raise AssertionError(f"{option}={junk!r}") from error
            try:
                run(optimizer, params, range(1))
                optimizer.state_dict()
            except Exception as error:
                raise AssertionError(f"stepping with {option}={junk!r}") from error


@pytest.mark.parametrize("junk", [{"exp_avg": 3}, {"step": "x"}, {"exp_avg": torch.zeros(3)}, {"weight_low": {"a": 1}}])
def test_junk_in_the_live_state(junk: dict[str, Any]) -> None:
    params = parameters(torch.bfloat16)
    optimizer = EVERY["adamw"](params.items())
    run(optimizer, params, range(1))
    optimizer.state[params["a.weight"]] = junk
    with pytest.raises(OptimizerError, match=r"a\.weight"):
        run(optimizer, params, range(1))
