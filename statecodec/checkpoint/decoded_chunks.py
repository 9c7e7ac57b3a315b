"""Keeps chunks that were decoded as companions of others until it is their own turn, which comes soon in a file."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


Key = tuple[int, int]  # item, chunk


class DecodedChunks:
    """The last few decoded chunks, whole. Thread-safe; what it holds must not be changed."""

    def __init__(self, keep: int = 24 << 20) -> None:
        """Hold at most `keep` bytes."""
        self._keep = keep
        self._lock = threading.Lock()
        self._held: OrderedDict[Key, Tensor] = OrderedDict()
        self._nbytes = 0

    def put(self, key: Key, chunk: Tensor) -> None:
        """Hold a chunk; the oldest ones are dropped where there is no room."""
        with self._lock:
            if key in self._held or chunk.nbytes > self._keep:
                return
            self._held[key] = chunk
            self._nbytes += chunk.nbytes
            while self._nbytes > self._keep:
                self._nbytes -= self._held.popitem(last=False)[1].nbytes

    def take(self, key: Key) -> Tensor | None:
        """Take a chunk out; None if it is not there."""
        with self._lock:
            chunk = self._held.pop(key, None)
            if chunk is not None:
                self._nbytes -= chunk.nbytes
            return chunk
