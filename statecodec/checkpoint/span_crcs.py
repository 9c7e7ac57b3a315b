"""CRC-32s of spans of a file, put together from those of pieces that are read or written anyway."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable

from zlib_ng import zlib_ng

from statecodec.layouts import Crc32

_BLOCK = 1 << 20
_Pieces = dict[int, tuple[int, int]]  # first byte of the file -> number of bytes, their CRC-32


class SpanCrcs:
    """Takes pieces in any order, also twice; what is in none of them is read from the file. Thread-safe."""

    def __init__(
        self, spans: Iterable[Crc32], read: Callable[[int, memoryview], None], done: Callable[[Crc32, int], None]
    ) -> None:
        """`read` fills memory with the file's bytes; `done` gets every span and its CRC-32, again if it raised."""
        self._spans = sorted((span for span in spans if span.nbytes), key=lambda span: span.offset)
        self._starts = [span.offset for span in self._spans]
        self._missing = {number: span.nbytes for number, span in enumerate(self._spans)}
        self._pieces: dict[int, _Pieces] = {}
        self._read, self._done, self._lock = read, done, threading.Lock()

    def add(self, start: int, nbytes: int, crc: int) -> None:
        """File bytes from `start` have this CRC-32. They lie in one span or count for nothing."""
        number = bisect_right(self._starts, start) - 1
        if number < 0 or start + nbytes > self._starts[number] + self._spans[number].nbytes:
            return
        with self._lock:
            if number not in self._missing:
                return
            pieces = self._pieces.setdefault(number, {})
            self._missing[number] -= nbytes - pieces.get(start, (0, 0))[0]
            pieces[start] = nbytes, crc
            if self._missing[number] > 0:
                return
            del self._missing[number], self._pieces[number]
        try:
            self._finish(number, pieces)
        except BaseException:  # nobody may hear of it, if it was raised by work ahead of its turn
            self._missing[number] = self._spans[number].nbytes
            raise

    def finish(self) -> None:
        """Finish the spans that are not complete yet."""
        while self._missing:
            number = next(iter(self._missing))
            del self._missing[number]
            self._finish(number, self._pieces.pop(number, {}))

    def _finish(self, number: int, pieces: _Pieces) -> None:
        span = self._spans[number]
        value, at = 0, span.offset
        for start, (nbytes, crc) in sorted(pieces.items()):
            if start >= at:  # otherwise the same bytes, cut in another way
                value = zlib_ng.crc32_combine(self._over(at, start, value), crc, nbytes)
                at = start + nbytes
        self._done(span, self._over(at, span.offset + span.nbytes, value))

    def _over(self, start: int, stop: int, value: int) -> int:
        """The CRC-32 so far, with the file's bytes from `start` to `stop` behind it."""
        block = memoryview(bytearray(min(_BLOCK, stop - start)))
        for offset in range(start, stop, _BLOCK):
            piece = block[: stop - offset]
            self._read(offset, piece)
            value = zlib_ng.crc32(piece, value)
        return value
