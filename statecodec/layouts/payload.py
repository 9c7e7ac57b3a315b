"""What a layout's `tree` reads tensors with: bytes of files, put where the caller wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Read: TypeAlias = "Callable[[str, int, int], Tensor]"
"""(path, offset, nbytes) -> those bytes of a file as a 1-D uint8 tensor, writable and owned by the caller."""

Fill: TypeAlias = "Callable[[str, int, Tensor], Iterator[int]]"
"""(path, offset, out) -> fills `out`, 1-D uint8 on the CPU; gives the number of bytes of each piece as it is there."""


class Room(Protocol):
    """Where tensors are that stay."""

    def take(self, nbytes: int) -> Tensor:
        """So many bytes, 1-D uint8 on the CPU, with arbitrary contents."""
        ...

    def used(self, nbytes: int) -> None:
        """Told that so many of them were filled."""
        ...


class Memory:
    """In memory."""

    def take(self, nbytes: int) -> Tensor:
        """Fresh memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def used(self, nbytes: int) -> None:
        """Nothing to do."""


MEMORY = Memory()


@dataclass(frozen=True)
class Payload:
    """The bytes of files as tensors.

    Args:
        fill: Supplies the bytes.
        room: Where they are put.
        device: Where the tensors are moved then; on the device `meta` nothing is read.
    """

    fill: Fill
    room: Room = MEMORY
    device: torch.device | None = None

    @classmethod
    def of(cls, read: Read) -> Payload:
        """From a function that gives tensors of its own.

        Args:
            read: The function; its tensors are copied.

        Returns:
            What reads with it, into memory.
        """

        def fill(path: str, offset: int, out: Tensor) -> Iterator[int]:
            out.copy_(read(path, offset, out.numel()))
            yield out.numel()

        return cls(fill)

    def __call__(self, path: str, offset: int, nbytes: int) -> Tensor:
        """Bytes of a file, as a tensor that stays."""
        out = self.take(nbytes)
        self.into(out, path, offset)
        return self.moved(out)

    def take(self, nbytes: int) -> Tensor:
        """Where a tensor is put together; `moved` then gives the tensor.

        Args:
            nbytes: Its size.

        Returns:
            1-D uint8 with arbitrary contents, on the CPU or the device `meta`.
        """
        if self._is_meta:
            return torch.empty(nbytes, dtype=torch.uint8, device="meta")
        return self.room.take(nbytes)

    def into(self, out: Tensor, path: str, offset: int) -> None:
        """Read bytes of a file.

        Args:
            out: A part of what `take` gave; it says how many bytes.
            path: The file.
            offset: Where in the file they begin.
        """
        if not self._is_meta:
            for nbytes in self.fill(path, offset, out):
                self.room.used(nbytes)

    def moved(self, tensor: Tensor) -> Tensor:
        """Bring a tensor to the device where it shall be.

        Args:
            tensor: A view of `take`'s bytes.

        Returns:
            The same tensor if it is there.
        """
        return tensor if self.device is None or self._is_meta else tensor.to(self.device)

    @property
    def aside(self) -> Payload:
        """The same for bytes that are used once, to put a tensor together."""
        return replace(self, room=MEMORY, device=self.device if self._is_meta else None)

    @property
    def _is_meta(self) -> bool:
        return self.device is not None and self.device.type == "meta"
