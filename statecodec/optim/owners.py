"""Steps matrices that are sharded over ranks, for methods that need a whole matrix: its owner, one rank, steps it.

Gradient, weight and states are put together on the owner as they are stored, and what it has stored goes back in
pieces. So the result is that of one process, and a state stays where its parameter is. The factors of LoRA-Pre are
small: every rank keeps them whole. Owners take turns, and have about as many elements each. The matrices of the next
round are on their way while those of this one are stepped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from statecodec.optim import sharding
from statecodec.optim.exchange import LocalPiece, gather, scatter
from statecodec.optim.matrices import StoredMatrix, WholeMatrix, batches, members, step_batch
from statecodec.optim.method import Group, made_for
from statecodec.optim.states import StateKeeper


def step_matrices(optimizer: StateKeeper, group: Group, params: Sequence[Tensor]) -> list[Tensor]:
    """Step those of `params` that have a WholeMatrix method; returns the others. All have gradients."""
    rest, alike = list[Tensor](), defaultdict[Any, list[Tensor]](list)
    for p in params:
        method = optimizer.recipe(p, group).method
        if isinstance(method, WholeMatrix):
            alike[method.kind, made_for(p)].append(p)
        else:
            rest.append(p)
    for same in alike.values():
        for batch in () if sharding.is_cut(same[0]) else batches(same):
            step_batch(optimizer, group, [m.local() for m in members(optimizer, group, batch)])
    cut = [same for same in alike.values() if sharding.is_cut(same[0])]
    if cut:
        step_cut(optimizer, group, cut)
    return rest


def step_cut(optimizer: StateKeeper, group: Group, alike: Sequence[Sequence[Tensor]]) -> None:
    """Step matrices of which this rank holds pieces; those of one shape, method and place together.

    All ranks that hold pieces must call it with the same matrices.
    """
    planned = rounds(optimizer, alike)
    begun: _Round | None = _Round(optimizer, group, *planned[0])
    going_back: Callable[[], None] | None = None
    for following in [*planned[1:], None]:
        assert begun is not None
        now, begun = begun, None if following is None else _Round(optimizer, group, *following)
        sent = now.step()
        if going_back is not None:
            going_back()
        going_back = sent
    if going_back is not None:
        going_back()


def rounds(optimizer: StateKeeper, alike: Sequence[Sequence[Tensor]]) -> list[tuple[Sequence[Tensor], list[int]]]:
    """Batches of matrices with their owners' ranks: largest first, each to the rank with the fewest elements."""
    dealt = []
    held: dict[Any, list[int]] = defaultdict(list)
    for same in sorted(alike, key=lambda batch: -batch[0].numel()):
        ranks = sharding.cut_group(same[0])
        world = ranks.size()
        loads = held[ranks] = held[ranks] or [0] * world
        for batch in batches(same, world):
            owners = []
            for p in batch:
                first = optimizer.position(p)  # matrices that are stepped alone get owners in turn
                owner = min(range(world), key=lambda r: (loads[r], (r - first) % world))
                loads[owner] += p.numel()
                owners.append(owner)
            dealt.append((batch, owners))
    return dealt


class _Round:
    """Matrices of one shape, of which each rank steps those that it owns."""

    def __init__(self, optimizer: StateKeeper, group: Group, params: Sequence[Tensor], owners: Sequence[int]) -> None:
        self._optimizer, self._group, self._owners = optimizer, group, owners
        self._ranks = sharding.cut_group(params[0])
        self._members = members(optimizer, group, params)
        self._cuts = [_cuts(m, p) for m, p in zip(self._members, params, strict=True)]
        self._whole = gather(self._ranks, self._cuts, owners)

    def step(self) -> Callable[[], None]:
        """Step this rank's matrices and begin to send them back; returns a function that waits for the others'."""
        full = self._whole()
        owned = [m for m, owner in zip(self._members, self._owners, strict=True) if owner == self._ranks.rank()]
        if owned:
            gathered = [
                replace(m, gradient=grad, skipped=skipped, stored=dict(zip(m.stored, stored, strict=True)))
                for m, (grad, skipped, *stored) in zip(owned, full, strict=True)
            ]
            step_batch(self._optimizer, self._group, gathered)
        return scatter(self._ranks, [cut[1:] for cut in self._cuts], self._owners, [x[1:] for x in full])


def _cuts(m: StoredMatrix, p: Tensor) -> list[LocalPiece]:
    """Gradient, count of skipped steps, and what is stored, as this rank holds them."""
    stored = [LocalPiece(sharding.local(t).detach(), tuple(t.shape), sharding.cut_dim(t, p)) for t in m.stored.values()]
    return [
        LocalPiece(m.gradient.detach(), tuple(p.shape), sharding.cut_dim(p, p)),
        LocalPiece(m.skipped, (), None),
        *stored,
    ]
