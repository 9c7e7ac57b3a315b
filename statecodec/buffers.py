"""Reused byte buffers: a fresh buffer costs more in page faults than filling it."""

from __future__ import annotations

import threading
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]


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
        """Hand a buffer back; nobody may use it after that."""
        with self._lock:
            if buffer.size <= self._room:
                self._room -= buffer.size
                self._free.setdefault(buffer.size, []).append(buffer)
