"""Gathers each tensor that is sharded over ranks on one rank, its owner, and scatters it back.

All tensors of a round travel in one message (`all_to_all`), as bytes: nothing is rounded, and 16-bit integers are
allowed. Messages are on their way while the ranks compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class LocalPiece:
    """What this rank holds of a tensor of `shape`: a piece along dimension `dim`, or all of it (None)."""

    local: Tensor
    shape: tuple[int, ...]
    dim: int | None

    def span(self, rank: int, world: int) -> tuple[int, int]:
        """Start and length of a rank's piece along `dim`, as torch cuts."""
        assert self.dim is not None
        size = self.shape[self.dim]
        each = -(-size // world)
        start = min(rank * each, size)
        return start, min(start + each, size) - start

    def piece_shape(self, rank: int, world: int) -> tuple[int, ...]:
        """The shape of a rank's piece."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.span(rank, world)[1], *self.shape[self.dim + 1 :])

    def piece(self, full: Tensor, rank: int, world: int) -> Tensor:
        """A rank's piece of the whole tensor."""
        return full if self.dim is None else full.narrow(self.dim, *self.span(rank, world))


def gather(
    group: ProcessGroup, cuts: Sequence[Sequence[LocalPiece]], owners: Sequence[int]
) -> Callable[[], list[list[Tensor]]]:
    """Begin to gather tensors: that of `cuts[i]` on the rank `owners[i]` of the group.

    Returns a function that waits, and gives the tensors that this rank owns, in order. What every rank holds whole is
    not sent, and given as it is. Every rank must call both with the same shapes.
    """
    rank, world = group.rank(), group.size()
    sent = [
        [c.local for cut, o in zip(cuts, owners, strict=True) if o == to for c in cut if c.dim is not None]
        for to in range(world)
    ]
    owned = [cut for cut, o in zip(cuts, owners, strict=True) if o == rank]
    message = _Message(
        group,
        sent,
        [
            [(c.piece_shape(r, world), c.local.dtype) for cut in owned for c in cut if c.dim is not None]
            for r in range(world)
        ],
        cuts[0][0].local.device,
    )

    def wait() -> list[list[Tensor]]:
        pieces = [iter(cut) for cut in message.wait()]
        return [
            [c.local if c.dim is None else torch.cat([next(p) for p in pieces], c.dim) for c in cut] for cut in owned
        ]

    return wait


def scatter(
    group: ProcessGroup, cuts: Sequence[Sequence[LocalPiece]], owners: Sequence[int], full: Sequence[Sequence[Tensor]]
) -> Callable[[], None]:
    """Begin to send tensors back: `full` are those that this rank owns, as `gather` gave them.

    Returns a function that waits, and writes what arrived into `LocalPiece.local`. Every rank must call both.
    """
    rank, world = group.rank(), group.size()
    owned = [cut for cut, o in zip(cuts, owners, strict=True) if o == rank]
    pairs = [pair for cut, values in zip(owned, full, strict=True) for pair in zip(cut, values, strict=True)]
    by_owner = [[c for cut, o in zip(cuts, owners, strict=True) if o == r for c in cut] for r in range(world)]
    message = _Message(
        group,
        [[c.piece(x, to, world) for c, x in pairs] for to in range(world)],
        [[(c.piece_shape(rank, world), c.local.dtype) for c in cut] for cut in by_owner],
        cuts[0][0].local.device,
    )

    def wait() -> None:
        for cut, pieces in zip(by_owner, message.wait(), strict=True):
            for c, piece in zip(cut, pieces, strict=True):
                c.local.copy_(piece.view(c.local.shape))

    return wait


class _Message:
    """Tensors for every rank, and the shapes and dtypes of those that every rank sends."""

    def __init__(
        self,
        group: ProcessGroup,
        sent: Sequence[Sequence[Tensor]],
        expected: Sequence[Sequence[tuple[tuple[int, ...], torch.dtype]]],
        device: torch.device,
    ) -> None:
        import torch.distributed as dist

        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        outgoing = [torch.cat([nothing, *map(_bytes, tensors)]) for tensors in sent]
        self._expected = expected
        self._sizes = [sum(_nbytes(*spec) for spec in specs) for specs in expected]
        self._sent = torch.cat(outgoing)
        self._received = torch.empty(sum(self._sizes), dtype=torch.uint8, device=device)
        self._work = dist.all_to_all_single(
            self._received, self._sent, self._sizes, [len(x) for x in outgoing], group=group, async_op=True
        )

    def wait(self) -> list[list[Tensor]]:
        """The tensors that came, by the rank that sent them."""
        if self._work is not None:
            self._work.wait()
        return [
            [
                piece.clone().view(dtype).view(shape)  # a clone is aligned
                for piece, (shape, dtype) in zip(
                    torch.split(received, [_nbytes(*spec) for spec in specs]) if specs else (), specs, strict=True
                )
            ]
            for received, specs in zip(torch.split(self._received, self._sizes), self._expected, strict=True)
        ]


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
