"""Reused byte buffers: a fresh buffer costs more in page faults than filling it."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Bytes: TypeAlias = NDArray[np.uint8]

_SCRATCH_LIMIT = 16 << 20
_VIEWS = 64  # shapes in which a buffer is kept at hand


class Pool:
    """Buffers by size class (powers of two). At most `keep` bytes are held for reuse. Thread-safe."""

    def __init__(self, keep: int = 128 << 20) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[Bytes]] = {}
        self._room = keep

    def take(self, nbytes: int) -> Bytes:
        """A buffer of at least `nbytes`, with arbitrary contents."""
        size = 1 << max(12, (nbytes - 1).bit_length())
        with self._lock:
            free = self._free.get(size)
            if free:
                self._room += size
                return free.pop()
        return np.empty(size, np.uint8)

    def give(self, buffer: Bytes) -> None:
        """Hand a buffer back. It must not be used after that."""
        with self._lock:
            if buffer.size <= self._room:
                self._room -= buffer.size
                self._free.setdefault(buffer.size, []).append(buffer)


class ThreadScratch(threading.local):
    """CPU tensors that a thread uses again for every chunk; pinned where a card copies from and to them."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._beside: ThreadScratch | None = None
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._views: dict[tuple[str, str], dict[tuple[torch.dtype, tuple[int, ...]], tuple[Tensor, memoryview]]] = {}

    @property
    def beside(self) -> ThreadScratch:
        """Another scratch of the same kind, for a second tensor that this thread works on at the same time."""
        if self._beside is None:
            self._beside = ThreadScratch(self._pinned)
        return self._beside

    def take(self, use: str, dtype: torch.dtype, shape: tuple[int, ...], name: str = "") -> Tensor:
        """A tensor with arbitrary contents; good until this thread takes one for the same use and name again.

        `name` tells apart the tensors of one use, such as the parts of a codec, whatever they are called.
        """
        return self.take_with_memory(use, dtype, shape, name)[0]

    def take_with_memory(
        self, use: str, dtype: torch.dtype, shape: tuple[int, ...], name: str = ""
    ) -> tuple[Tensor, memoryview]:
        """The same, and its `memory`."""
        views = self._views.setdefault((use, name), {})
        taken = views.get((dtype, shape))
        if taken is not None:  # most chunks are alike
            return taken
        nbytes = math.prod(shape) * dtype.itemsize
        held = self._buffers.get((use, name))
        if held is None or held.numel() < nbytes:
            pinned = self._pinned and nbytes <= _SCRATCH_LIMIT and torch.cuda.is_available()
            held = torch.empty(max(nbytes, 1), dtype=torch.uint8, device="cpu", pin_memory=pinned)
            if nbytes > _SCRATCH_LIMIT:
                return held.view(dtype).view(shape), memory(held)
            self._buffers[use, name] = held
            views.clear()
        if len(views) == _VIEWS:
            views.clear()
        taken = views[dtype, shape] = held[:nbytes].view(dtype).view(shape), memory(held[:nbytes])
        return taken


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def has_data(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers are in memory; false for sparse tensors and on the device meta."""
    return not tensor.is_meta and tensor.layout == torch.strided
