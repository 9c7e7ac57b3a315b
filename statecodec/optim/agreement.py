"""Agreement among ranks. Every function is a collective: all ranks must call it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from statecodec.errors import OptimizerError
from statecodec.optim.sharding import is_dtensor, mesh_of


def ranks_agree(p: Tensor, text: str) -> bool:
    """Whether every rank that holds a part of a parameter says the same."""
    if not is_dtensor(p):
        return True
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    high, low = _smallest(p, [digest, -digest])
    return high == -low


def all_say_yes(params: Iterable[Tensor], own: Sequence[bool]) -> list[bool]:
    """For each answer of this rank, whether all ranks that hold parts of the parameters say yes as well."""
    answers = [int(answer) for answer in own]
    for p in {mesh_of(p): p for p in params if is_dtensor(p)}.values():
        answers = _smallest(p, answers)
    return [bool(answer) for answer in answers]


@contextmanager
def on_all_ranks(params: Iterable[Tensor], message: str) -> Iterator[None]:
    """Run a block that fails on all ranks that hold parts of the parameters, or on none; it must not communicate.

    Raises OptimizerError with the message where only other ranks failed; they would not take part in what follows.
    """
    try:
        yield
    except Exception:
        all_say_yes(params, [False])
        raise
    if not all(all_say_yes(params, [True])):
        raise OptimizerError(message)


def _smallest(p: Tensor, numbers: Sequence[int]) -> list[int]:
    """The smallest of each number that any rank gives."""
    import torch.distributed as dist

    mesh = mesh_of(p)
    found = torch.tensor(numbers, dtype=torch.int64, device=mesh.device_type)
    for i in range(mesh.ndim):
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=mesh.get_group(i))
    return [int(n) for n in found]
