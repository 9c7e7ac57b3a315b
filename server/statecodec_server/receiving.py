"""Taking one request body into a spool file: bounded memory, regular checkpoints, and every way it can end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect

from .digests import Checksum
from .problems import HTTPProblem
from .settings import Settings
from .spool import Spool
from .storage import BLOCK

CHECKPOINT = 32 << 20  # bytes, and
CHECKPOINT_SECONDS = 5.0  # seconds, after which what has come is made durable and the upload's life is extended


class OffsetRecorder(Protocol):
    """Writes an acknowledged offset down."""

    def __call__(self, offset: int, *, whole: bool) -> None: ...


class Receiver:
    """One body on its way into one upload; `stop()` ends it as if the client had gone away."""

    def __init__(
        self,
        settings: Settings,
        spool: Spool,
        row: Mapping[str, Any],
        checksum: Checksum | None,
        record: OffsetRecorder,
    ) -> None:
        self._settings, self._spool, self._row = settings, spool, row
        self._checksum, self._record = checksum, record
        self._limit = settings.max_upload if row["length"] is None else row["length"]
        self._stop = asyncio.Event()
        self._every = min(CHECKPOINT_SECONDS, settings.upload_ttl / 4)

    def stop(self) -> None:
        """Take no further byte; save what came."""
        self._stop.set()

    async def run(self, body: AsyncIterator[bytes]) -> None:
        """Read until the end; raises an HTTPProblem when the body was wrong, after saving what can be saved."""
        ended = False
        try:
            ended = await self._pump(body)
        except (HTTPProblem, OSError):
            await run_sync(self._spool.roll_back)
            raise
        right = self._checksum is None or (ended and self._checksum.matches())
        if not right:
            await run_sync(self._spool.roll_back)
        length = self._row["length"]
        whole = right and (ended if length is None else self._spool.end == length)
        await self._save(whole=whole)
        if whole:  # also where the end of the body did not come after its last byte, or the request was stopped there
            return
        if ended and not right:
            raise HTTPProblem(460, "upload.checksum", "The body does not match its Upload-Checksum; nothing was kept.")
        if not ended and self._stop.is_set():
            raise HTTPProblem(503, "unavailable", "This request was stopped; what came is saved. Ask for the offset.")
        if not ended:
            raise HTTPProblem(408, "body.timeout", "The body ended early or stayed silent; what came is saved.")

    async def _save(self, *, whole: bool) -> None:
        try:
            offset = await run_sync(self._spool.sync)
        except OSError:
            await run_sync(self._spool.roll_back)
            raise
        await run_sync(lambda: self._record(offset, whole=whole))

    async def _keep(self) -> None:
        """While the body still comes: acknowledge what is there, or with a checksum only that the upload lives."""
        if self._checksum is None:
            await self._save(whole=False)
        else:
            await run_sync(lambda: self._record(self._spool.synced, whole=False))

    async def _pump(self, body: AsyncIterator[bytes]) -> bool:
        """True when the body came to its proper end."""
        buffer, due = bytearray(), time.monotonic() + self._every
        while chunk := await self._next(body):
            if self._spool.end + len(buffer) + len(chunk) > self._limit:
                announced = self._row["length"] is not None
                raise HTTPProblem(
                    400 if announced else 413,
                    "upload.length" if announced else "body.size",
                    f"The body goes beyond {int(self._limit):,} bytes; its last part was not kept.",
                )
            buffer += chunk
            late = time.monotonic() >= due
            if len(buffer) >= BLOCK or late:
                await run_sync(self._take, bytes(buffer))
                buffer.clear()
                if late or (self._checksum is None and self._spool.end - self._spool.synced >= CHECKPOINT):
                    await self._keep()
                    due = time.monotonic() + self._every
        if buffer:
            await run_sync(self._take, bytes(buffer))
        return chunk is not None

    def _take(self, data: bytes) -> None:
        if self._checksum is not None:
            self._checksum.update(data)
        self._spool.write(data)

    async def _next(self, body: AsyncIterator[bytes]) -> bytes | None:
        """The next bytes; b"" at the end; None when the client went away, fell silent, or we were stopped."""
        if self._stop.is_set():
            return None
        arrival = asyncio.ensure_future(_advance(body))
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait(
                {arrival, stopped}, timeout=self._settings.body_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not arrival.done():
                arrival.cancel()
                await asyncio.gather(arrival, return_exceptions=True)
                return None
            return arrival.result()
        except ClientDisconnect:
            return None
        finally:
            stopped.cancel()


async def _advance(body: AsyncIterator[bytes]) -> bytes:
    async for chunk in body:
        if chunk:
            return chunk
    return b""


async def never() -> AsyncIterator[bytes]:
    """A body without a byte."""
    nothing: tuple[bytes, ...] = ()
    for chunk in nothing:
        yield chunk
