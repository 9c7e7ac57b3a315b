"""StatecodecWriter and StatecodecReader among ranks: what each rank reads, and a rank that is killed.

FSDP2 states are saved by N ranks and loaded by M.
"""

from __future__ import annotations

import os
import signal
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import statecodec
from statecodec import optim, staging
from statecodec.codecs import chunking
from statecodec.distributed import StatecodecReader, StatecodecWriter
from statecodec.files import LocalFile
from tests.distributed.fsdp2 import OPTIMIZERS, everything, sharded, state_of, train
from tests.distributed.ranks import Ranks

WORLD = range(1, 5)
FORMS: dict[str, dict[str, Any]] = {"lossless": {"preset": "lossless"}, "resume": {}, "flat": {}}
SAVED = [*product(("lossless", "resume"), WORLD), ("flat", 2), ("flat", 3)]


class Training:
    """A model, a running average of its weights and torch's AdamW on all ranks."""

    def __init__(self) -> None:
        """Uneven shards, a bias smaller than some worlds, and a parameter of one row."""
        torch.manual_seed(0)
        layers = [torch.nn.Linear(90, 301), torch.nn.GELU(), torch.nn.Linear(301, 3), torch.nn.Linear(3, 1)]
        self.model = torch.nn.Sequential(*layers)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        self.average = {name: w.clone() for name, w in get_model_state_dict(self.model).items()}

    def step(self, steps: int) -> float:
        """The last loss; every rank sees the same batches."""
        torch.manual_seed(1)
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(16, 90)).square().mean()
            loss.backward()
            self.optimizer.step()
            for name, w in get_model_state_dict(self.model).items():
                self.average[name].lerp_(w, 0.1)
        return float(loss.detach())

    def state(self, form: str) -> dict[str, Any]:
        """What is saved."""
        options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
        states = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        note = {"step": 3, "who": "ranks"}
        return {"model": get_model_state_dict(self.model), "optim": states, "ema": self.average, "note": note}

    def take(self, state: dict[str, Any], form: str) -> None:
        """Go on from what was saved."""
        options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, optim_state_dict=state["optim"], options=options)

    def full(self) -> dict[str, np.ndarray]:
        """All tensors, whole."""
        options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
        states = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        average = {f"ema.{name}": w.full_tensor() for name, w in self.average.items()}
        found = {**get_model_state_dict(self.model, options=options), **states, **average}
        return {name: value.numpy().copy() for name, value in found.items() if isinstance(value, torch.Tensor)}


def save(folder: Path) -> dict[str, np.ndarray]:
    """In all forms, and by torch's own writer."""
    n, training = dist.get_world_size(), Training()
    training.step(3)
    for form in (form for form, by in SAVED if by == n):
        writer = StatecodecWriter(folder / f"{form}-{n}", threads=1, **FORMS[form])
        dcp.save(training.state(form), storage_writer=writer)
    dcp.save(training.state(""), checkpoint_id=folder / f"plain-{n}")
    return training.full()


def load(folder: Path) -> dict[tuple[str, int], tuple[dict[str, np.ndarray], Any, float]]:
    """What every world has saved, on this one: all tensors, the note, and the loss two steps on."""
    found, training = {}, Training()
    for form, n in SAVED:
        training.step(1)
        state = training.state(form)
        state["note"] = {"step": 0, "who": "nobody"}
        dcp.load(state, storage_reader=StatecodecReader(folder / f"{form}-{n}"))
        training.take(state, form)
        found[form, n] = training.full(), state["note"], training.step(2)
    return found


def test_saved_by_n_ranks_and_loaded_by_m(ranks: Ranks, tmp_path: Path) -> None:
    """Lossless the same bits; else the same bits for every M, within one percent of a step."""
    whole = {n: ranks.run(n, save, tmp_path)[0] for n in WORLD}
    loads = {m: ranks.run(m, load, tmp_path)[0] for m in WORLD}
    exact = loads[1]["lossless", 1][2]
    for file in (tmp_path / "flat-3").glob("rank-*"):
        of_averages = {t.codec.partition("(")[0] for t in statecodec.inspect(file).tensors if t.role == "ema"}
        assert "following" in of_averages, "beside the rank's own piece of the weight"
    assert {len(tensors) for tensors in whole.values()} == {6 + 3 * 6 + 6}
    for form, n in SAVED:
        expected = whole[n] if form == "lossless" else loads[1][form, n][0]
        for m in WORLD:
            found, note, loss = loads[m][form, n]
            assert found.keys() == whole[n].keys()
            assert all(np.array_equal(found[name], value) for name, value in expected.items()), (form, n, m)
            assert note == {"step": 3, "who": "ranks"}
            assert loss == pytest.approx(exact, rel=1e-3)
        if form != "lossless":
            within_one_percent_of_a_step(whole[n], expected)
        plain = sum(path.stat().st_size for path in (tmp_path / f"plain-{n}").rglob("*.distcp"))
        packed = sum(path.stat().st_size for path in (tmp_path / f"{form}-{n}").iterdir())
        assert packed < (1 if form == "lossless" else 0.7) * plain  # of a model of 28,000 parameters


def within_one_percent_of_a_step(exact: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    def update(values: dict[str, np.ndarray]) -> np.ndarray:
        m, v = (values[f"state.0.weight.{key}"].astype(np.float64) for key in ("exp_avg", "exp_avg_sq"))
        return m / (np.sqrt(v) + 1e-8)

    u = update(exact)
    assert 0 < np.linalg.norm(update(found) - u) <= 0.0101 * np.linalg.norm(u)
    step = 1e-3 * u * (1 - 0.95**3) ** 0.5 / (1 - 0.9**3)
    for name in ("0.weight", "ema.0.weight"):
        moved = found[name].astype(np.float64) - exact[name]
        assert 0 < np.linalg.norm(moved) <= 0.0201 * np.linalg.norm(step)


def saved_while_training(folder: Path) -> None:
    """In a process group of its own, as training uses the other one meanwhile."""
    training, group = Training(), dist.new_group(backend="gloo")
    training.step(3)
    expected = training.full()
    writer = StatecodecWriter(folder, preset="lossless")
    saved = dcp.async_save(training.state(""), storage_writer=writer, process_group=group)
    training.step(1)
    saved.result()
    state = training.state("")
    dcp.load(state, storage_reader=StatecodecReader(folder))
    training.take(state, "")
    assert all(np.array_equal(value, expected[name]) for name, value in training.full().items())


def encoded_while_training(folder: Path) -> None:
    """Steps change encoded states in place."""
    group = dist.new_group(backend="gloo")
    trained = {name: (model := sharded(), make(model.named_parameters())) for name, make in OPTIMIZERS.items()}
    for pair in trained.values():
        train(*pair, range(2))
    expected = {name: everything(*pair) for name, pair in trained.items()}
    state = {name: state_of(*pair) for name, pair in trained.items()}
    saved = dcp.async_save(state, storage_writer=StatecodecWriter(folder, preset="lossless"), process_group=group)
    for name, pair in trained.items():
        train(*pair, range(2, 3))
        assert everything(*pair) != expected[name]
    saved.result()
    state = {name: state_of(*pair) for name, pair in trained.items()}
    dcp.load(state, storage_reader=StatecodecReader(folder))
    for name, (model, optimizer) in trained.items():
        set_model_state_dict(model, state[name]["model"])
        set_optimizer_state_dict(model, optimizer, state[name]["optim"])
        assert everything(model, optimizer) == expected[name], name


@pytest.mark.parametrize("check", [saved_while_training, encoded_while_training], ids=lambda f: f.__name__)
def test_an_asynchronous_save(ranks: Ranks, tmp_path: Path, check: Any) -> None:
    ranks.run(2, check, tmp_path)


# --- what a rank reads


def encoded() -> tuple[torch.nn.Module, optim.StateOptimizer]:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(torch.nn.Linear(256, 2048, bias=False).bfloat16(), mesh=mesh)
    return model, optim.AdamW(model.named_parameters(), lr=1e-2)


def encoded_state(model: torch.nn.Module, optimizer: optim.StateOptimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def save_encoded(folder: Path) -> Any:
    """In chunks of 16 rows, as a large tensor is in chunks of many."""
    for function in (chunking.iterate, chunking.chunks):
        function.__defaults__ = (4096,)
    try:
        model, optimizer = encoded()
        model(torch.randn(4, 256).bfloat16()).float().square().mean().backward()
        optimizer.step()
        dcp.save(encoded_state(model, optimizer), storage_writer=StatecodecWriter(folder, threads=1))
    finally:
        for function in (chunking.iterate, chunking.chunks):
            function.__defaults__ = (chunking.CHUNK_ELEMENTS,)
    return everything(model, optimizer)


def load_encoded(folder: Path) -> tuple[Any, int]:
    """The states, and the bytes that this rank read from the files of ranks."""
    model, optimizer = encoded()
    state = encoded_state(model, optimizer)
    read, real = [], LocalFile.read_into

    def counted(self: LocalFile, offset: int, target: memoryview) -> None:
        read.append(len(target))
        real(self, offset, target)

    LocalFile.read_into = counted  # type: ignore[method-assign]
    try:
        dcp.load(state, storage_reader=StatecodecReader(folder))
    finally:
        LocalFile.read_into = real  # type: ignore[method-assign]
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    assert optimizer.load_report.exact
    return everything(model, optimizer), sum(read)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 2), (4, 3)])
def test_a_rank_reads_the_rows_of_encoded_states_that_it_holds(ranks: Ranks, tmp_path: Path, n: int, m: int) -> None:
    expected = ranks.run(n, save_encoded, tmp_path)[0]
    stored = sum(path.stat().st_size for path in tmp_path.iterdir())
    answers = ranks.run(m, load_encoded, tmp_path)
    assert all(found == expected for found, _ in answers)
    assert all(nbytes < 1.15 * stored / m for _, nbytes in answers), "its share, chunks at its borders, and the indices"


# --- a rank that is killed


def save_then_die(folder: Path) -> None:
    """Rank 1 is killed in the middle of its file of the second save."""
    training = Training()
    dcp.save(training.state(""), storage_writer=StatecodecWriter(folder, preset="lossless"))
    training.step(1)
    if dist.get_rank() == 1:
        staging.StagedFile.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    dcp.save(training.state(""), storage_writer=StatecodecWriter(folder, preset="lossless"))


def load_first(folder: Path) -> None:
    training = Training()
    expected = get_model_state_dict(training.model)
    expected = {name: value.full_tensor().clone() for name, value in expected.items()}
    training.step(1)
    state = training.state("")
    dcp.load(state, storage_reader=StatecodecReader(folder))
    assert all(torch.equal(value.full_tensor(), expected[name]) for name, value in state["model"].items())


def test_a_killed_rank_leaves_the_checkpoint_before(ranks: Ranks, tmp_path: Path) -> None:
    others = Ranks()
    with pytest.raises(AssertionError, match=r"rank \d of 2"):
        others.run(2, save_then_die, tmp_path)
    # The other rank is stopped once this one is found dead, in its file or after it.
    assert any(path.name.endswith(".tmp") for path in tmp_path.iterdir()), "it was killed in its file"
    ranks.run(3, load_first, tmp_path)
