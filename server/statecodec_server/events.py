"""Server-sent events: one reader of the job table feeds every listener."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import sqlalchemy as sa
from anyio.to_thread import run_sync

from .database import Database, jobs
from .problems import HTTPProblem
from .records import ENDED
from .schemas import job_document
from .settings import Settings

log = logging.getLogger("statecodec.server.events")
KEEP_ALIVE = 15.0
Row = Mapping[str, Any]


class Listener:
    """The newest unseen state of one job; older ones it never saw are skipped."""

    def __init__(self) -> None:
        self._row: Row | None = None
        self._news = asyncio.Event()
        self.closed = False

    def tell(self, row: Row) -> None:
        """Take a new state of the job."""
        self._row = row
        self._news.set()

    def close(self) -> None:
        """End: no further change comes."""
        self.closed = True
        self._news.set()

    async def next(self, timeout: float) -> Row | None:
        """The next change; None when none came in time or when closed."""
        try:
            await asyncio.wait_for(self._news.wait(), timeout)
        except asyncio.TimeoutError:
            return None
        self._news.clear()
        row, self._row = self._row, None
        return row


class Watcher:
    """Polls the jobs that have listeners, in one query, as long as there are any."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        self._listeners: dict[str, set[Listener]] = {}
        self._seen: dict[str, tuple[Any, ...]] = {}

    @property
    def count(self) -> int:
        """How many streams are open."""
        return sum(map(len, self._listeners.values()))

    async def run(self) -> None:
        """Read, compare and tell, until it is cancelled."""
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            listened = list(self._listeners)
            if not listened:
                continue
            try:
                rows = await run_sync(self._database.all, sa.select(jobs).where(jobs.c.id.in_(listened)))
            except sa.exc.SQLAlchemyError as error:
                log.warning("the job table could not be read", extra={"fields": {"error": str(error)}})
                continue
            for row in rows:
                mark = (row["state"], row["stage"], row["done"], row["total"], row["attempt"], row["cancel"])
                if self._seen.get(row["id"]) != mark:
                    self._seen[row["id"]] = mark
                    for listener in self._listeners.get(row["id"], ()):
                        listener.tell(row)
            for gone in set(listened) - {row["id"] for row in rows}:
                for listener in self._listeners.get(gone, ()):
                    listener.close()

    def close(self) -> None:
        """End every stream."""
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.close()

    def check(self) -> None:
        """Raises a 503 problem when no further stream may be opened."""
        if self.count >= self._settings.max_streams:
            raise HTTPProblem(503, "unavailable", "Too many event streams are open; poll instead.")

    def _subscribe(self, row: Row) -> Listener:
        listener = Listener()
        listener.tell(row)
        self._listeners.setdefault(row["id"], set()).add(listener)
        self._seen.pop(row["id"], None)  # the row may be older than what the others have been told
        return listener

    def _unsubscribe(self, job: str, listener: Listener) -> None:
        listeners = self._listeners[job]
        listeners.discard(listener)
        if not listeners:
            del self._listeners[job]
            self._seen.pop(job, None)

    async def stream(self, row: Row) -> AsyncIterator[bytes]:
        """The event stream of a job from its state `row` on, until it ends."""
        listener = self._subscribe(row)
        try:
            yield b"retry: 1000\n\n"
            while not listener.closed:
                news = await listener.next(KEEP_ALIVE)
                if news is None:
                    yield b": still here\n\n"
                    continue
                ended = news["state"] in ENDED
                text = json.dumps(job_document(news), separators=(",", ":"))
                yield f"event: {'end' if ended else 'progress'}\ndata: {text}\n\n".encode()
                if ended:
                    return
        finally:
            self._unsubscribe(row["id"], listener)
