"""Every optimizer's checkpoint, saved by N ranks and loaded by M, compared with the matrix in docs/distributed.md."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.utils._pytree import tree_map_only

from statecodec import optim
from statecodec.codecs import EncodedTensor
from statecodec.distributed import StatecodecReader, StatecodecWriter
from statecodec.optim.sharding import is_dtensor, local
from tests.distributed.fsdp2 import OPTIMIZERS, sharded, state_of, train
from tests.distributed.ranks import Ranks

WORLD = (1, 2, 3, 4)
# Encoded: bf16 weights with the low bits of their masters, moments in 8 bits. Plain: fp32, as torch.optim has them.
DTYPES = {"encoded": torch.bfloat16, "plain": torch.float32}
FILES = {"dcp": "torch's DCP files", "own": "`StatecodecWriter`"}
Made = dict[str, tuple[nn.Module, optim.StateOptimizer]]


class Cell(NamedTuple):
    optimizer: str
    form: str
    files: str
    saved_by: int
    loaded_by: int


class Piece(NamedTuple):
    """What a rank holds of a tensor."""

    begins: tuple[int, ...]
    own: np.ndarray

    @property
    def place(self) -> tuple[slice, ...]:
        return tuple(slice(b, b + n) for b, n in zip(self.begins, self.own.shape, strict=True))


Held = dict[str, dict[tuple[str, ...], Piece]]  # by optimizer, and by parameter, state and part


def made(form: str) -> Made:
    found = {}
    for name, make in OPTIMIZERS.items():
        model = sharded(DTYPES[form])
        found[name] = model, make(model.named_parameters(), **({} if form == "encoded" else {"moments": "dense"}))
    return found


def held(trained: Made) -> Held:
    return {name: pieces(*pair) for name, pair in trained.items()}


def pieces(model: nn.Module, optimizer: optim.StateOptimizer) -> dict[tuple[str, ...], Piece]:
    """What this rank holds of weights and states: to gather thousands of tensors would take a minute."""
    found: dict[tuple[str, ...], torch.Tensor] = {}
    for name, p in model.named_parameters():
        found[name,] = p.detach()
        for key, value in optimizer.state[p].items():
            if isinstance(value, EncodedTensor):
                found |= {(name, key, part): t for part, t in value.parts.items()}
            elif key != "skipped":
                found[name, key] = value
    return {key: piece(t) for key, t in found.items()}


def piece(x: torch.Tensor) -> Piece:
    begins = tuple(x.__create_chunk_list__()[0].offsets) if is_dtensor(x) else (0,) * x.ndim
    own = local(x).clone()
    return Piece(begins, (own.view(torch.int16) if own.dtype == torch.bfloat16 else own).numpy())


def joined(ranks: list[dict[tuple[str, ...], Piece]]) -> dict[tuple[str, ...], bytes]:
    """The bits of everything, whole; what several ranks hold must be the same."""
    found = {}
    for key in ranks[0]:
        parts = [rank[key] for rank in ranks]
        whole = np.zeros(
            [max(p.begins[d] + p.own.shape[d] for p in parts) for d in range(parts[0].own.ndim)], parts[0].own.dtype
        )
        for part in parts:
            whole[part.place] = part.own
        assert all(whole[part.place].tobytes() == part.own.tobytes() for part in parts), key
        found[key] = whole.tobytes()
    return found


def save(folder: str) -> dict[str, Held]:
    """One checkpoint of all optimizers of a form, in torch's files and in ours."""
    found = {}
    for form in DTYPES:
        trained = made(form)
        for pair in trained.values():
            train(*pair, range(dist.get_world_size(), dist.get_world_size() + 2))  # other batches, other states
        state = {name: state_of(*pair) for name, pair in trained.items()}
        place = f"{folder}/{form}-{dist.get_world_size()}"
        dcp.save(state, checkpoint_id=f"{place}-dcp")
        dcp.save(state, storage_writer=StatecodecWriter(f"{place}-own", preset="lossless", threads=1))
        found[form] = held(trained)
    return found


def load(folder: str) -> dict[tuple[str, str, int], Held]:
    """What is held after loading, by form, files and the number of ranks that saved."""
    found = {}
    for form in DTYPES:
        empty = made(form)
        state = {name: state_of(*pair) for name, pair in empty.items()}
        for files, n in product(FILES, WORLD):
            path = f"{folder}/{form}-{n}-{files}"
            reader = StatecodecReader(path) if files == "own" else None
            tree_map_only(torch.Tensor, lambda t: local(t).zero_(), state)
            dcp.load(state, checkpoint_id=None if reader else path, storage_reader=reader)
            for name, (model, optimizer) in empty.items():
                set_model_state_dict(model, state[name]["model"])
                set_optimizer_state_dict(model, optimizer, state[name]["optim"])
                assert optimizer.load_report.exact, optimizer.load_report
            found[form, files, n] = held(empty)
        for pair in empty.values():
            train(*pair, range(2, 3))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def saved(ranks: Ranks, folder: str) -> dict[tuple[str, str, int], dict[tuple[str, ...], bytes]]:
    """Everything, by form, optimizer and the number of ranks that saved."""
    found = {}
    for n in WORLD:
        answers = ranks.run(n, save, folder)
        for form, name in product(DTYPES, OPTIMIZERS):
            found[form, name, n] = joined([answer[form][name] for answer in answers])
    return found


def test_every_world_saved_something_else(saved: Any) -> None:
    assert all(len({repr(saved[form, name, n]) for n in WORLD}) == len(WORLD) for form, name, _ in saved)


@pytest.fixture(scope="module")
def cells() -> dict[Cell, str]:
    """What became of every case, filled in by the tests."""
    return {}


@pytest.mark.parametrize("m", WORLD)
def test_saved_by_n_ranks_and_loaded_by_m(
    ranks: Ranks, folder: str, saved: Any, cells: dict[Cell, str], m: int
) -> None:
    answers = ranks.run(m, load, folder)
    for form, files, n in answers[0]:
        for name in OPTIMIZERS:
            found = joined([answer[form, files, n][name] for answer in answers])
            cells[Cell(name, form, files, n, m)] = "same bits" if found == saved[form, name, n] else "other bits"
    assert [cell for cell, result in cells.items() if cell.loaded_by == m and result != "same bits"] == []


def matrix(cells: dict[Cell, str]) -> str:
    """The table of docs/distributed.md."""
    columns = [*product(DTYPES, FILES)]
    head = ["saved by N, loaded by M, 1 to 4", *(f"{form}, {FILES[files]}" for form, files in columns)]
    lines = [head, ["---"] * len(head)]
    for name in OPTIMIZERS:
        line = [f"`{name}`"]
        for form, files in columns:
            results = [cells[Cell(name, form, files, n, m)] for n, m in product(WORLD, WORLD)]
            line.append(", ".join(f"{results.count(r)} of {len(results)}: {r}" for r in sorted(set(results))))
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_documented_matrix_is_what_happened(cells: dict[Cell, str]) -> None:
    if len(cells) < len(OPTIMIZERS) * len(DTYPES) * len(FILES) * len(WORLD) ** 2:
        pytest.skip("the tests above were not all run")
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    assert matrix(cells) in page.read_text(), matrix(cells)
