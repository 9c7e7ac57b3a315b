"""How a chunk is decoded; and chunks that were decoded as companions of others, kept until it is their own turn."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from statecodec.buffers import ThreadScratch
    from statecodec.codecs import Companions


@dataclass(frozen=True)
class Decoding:
    """Where and with what a chunk is decoded.

    Args:
        device: Where the arithmetic is done, for codecs whose values are the same on every device; None is the CPU.
        scratch: The thread's scratch memory. The result may lie in it: it is good until the thread's next chunk.
        companions: The chunk's companions, if they are decoded already.
    """

    device: torch.device | None = None
    scratch: ThreadScratch | None = None
    companions: Companions | None = None


ON_THE_CPU = Decoding()


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
